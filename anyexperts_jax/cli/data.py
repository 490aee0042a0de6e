"""`anyexperts data show`, `anyexperts data check` and `anyexperts data export`."""

import argparse
import dataclasses
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyexperts_jax.data.config import DataConfig

from anyexperts_jax.cli.options import (
    add_command,
    add_config,
    add_data,
    add_set,
    data_overrides,
    natural,
    positive,
    positive_number,
    seed,
)


def run_show(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.mixture import Sources
    from anyexperts_jax.data.show import show_domain

    config = _mixture(options)
    sources = Sources(config)
    for name in config.domains:
        if name in config.places():
            print(sources.describe(name))
        show_domain(config, name, options.split, options.count, options.out, start=options.start, sources=sources)


def _mixture(options: argparse.Namespace) -> "DataConfig":
    """Returns the configuration of the domains to show: those of --config or generated ones, and those of --data."""
    from anyexperts_jax.core.errors import comma_list, require
    from anyexperts_jax.data.config import DataConfig, named_places
    from anyexperts_jax.data.domain import DOMAIN_NAMES

    if options.config is None and not options.set:
        config = DataConfig()
    else:
        from anyexperts_jax.train.config import load_config

        config = load_config(options.config or "tiny", options.set).data
    given = named_places(options.data, "--data")
    folders = config.places() | given
    default = (*(() if options.config is None else config.domains), *given) or DOMAIN_NAMES
    domains = tuple(dict.fromkeys(options.domain or default))
    in_folder = [name for name in domains if name in folders]
    all_generated = f"--level is for generated domains; {comma_list(in_folder)} comes from a folder"
    require(not (options.level and in_folder), all_generated)
    return dataclasses.replace(
        config,
        domains=domains,
        weights=None,
        folders=tuple(f"{name}={folders[name]}" for name in in_folder),
        seed=config.seed if options.seed is None else options.seed,
        levels=tuple(options.level or config.levels),
    )


def run_check(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from anyexperts_jax.core.errors import require
    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.data.check import check_data, require_clean, skipping
    from anyexperts_jax.data.check_tables import draw_lengths, reason_lines, shared_table, split_table, unusable_table
    from anyexperts_jax.data.mixture import Sources
    from anyexperts_jax.train.config import load_config

    own = data_overrides(options.config, options.data, options.plugin)
    config = load_config(options.config, [*own, *options.set], options.plugin).data
    require(
        bool(config.folders), f"{options.config} reads only generated domains; give your own data: --data NAME=PATH"
    )
    console = Console(highlight=False)
    sources = Sources(skipping(config))
    for name in config.places():
        print(sources.describe(name), flush=True)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks = {name: bar.add_task(f"reading {name}", total=None) for name in config.places()}
        reports, shared = check_data(
            config,
            processes=options.workers,
            near=options.near,
            plugins=options.plugin,
            sources=sources,
            progress=lambda name, done, total: bar.update(tasks[name], completed=done, total=total),
        )
    tables = (split_table(reports), unusable_table(reports), shared_table(shared))
    print_tables([table for table in tables if table is not None], console)
    for line in reason_lines(reports):
        print(line)
    print(f"wrote {draw_lengths(reports, config.encoding.max_length, options.out / 'lengths.png')}")
    require_clean(reports, shared)


def run_export(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.array_records import export_array_record
    from anyexperts_jax.data.source import GeneratedSource

    source = GeneratedSource(options.domain, options.split, options.count, options.seed, (1, 2, 3))
    folder = export_array_record(source, options.folder, options.split, shards=options.shards)
    print(f"{options.count} examples of {options.domain}/{options.split} in {folder}")


def add(commands: argparse._SubParsersAction) -> None:
    show_example = "anyexperts data show ocr speech --level 1 --out runs/data"
    own_example = "anyexperts data show --data mine=folder --split validation"
    check_example = "anyexperts data check tiny --data mine=chats.jsonl"
    export_example = "anyexperts data export nlp folder --split validation --count 500"
    data = add_command(
        commands,
        "data",
        "show examples of the five domains or of your own data, check your data, or write a domain to disk",
        (show_example, check_example, export_example),
    )
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    splits = ("train", "validation", "test")
    show = add_command(actions, "show", "print and draw examples (PNG, WAV)", (show_example, own_example))
    show.add_argument("domain", nargs="*", help="domains (default: all of --config and --data, or all five)")
    add_data(show, "your own data: a file, pattern, folder or address; repeatable")
    show.add_argument("--config", help="take the domains of a preset, a TOML file or a run (default: none)")
    add_set(show, "override of the configuration, as data.columns.answer=label; repeatable")
    show.add_argument("--split", default="train", choices=splits, help="split of the examples")
    show.add_argument("--count", type=int, default=12, help="examples of each domain")
    show.add_argument("--start", type=natural, default=0, help="index of the first example, from 0")
    show.add_argument("--seed", type=seed, help="seed of generated examples (default: the configuration's, or 0)")
    levels = "difficulties of generated domains (default: the configuration's, or all three)"
    show.add_argument("--level", type=int, nargs="+", choices=(1, 2, 3), help=levels)
    show.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/data"), help="folder for pictures and sound"
    )
    show.set_defaults(command=run_show)
    check = add_command(
        actions,
        "check",
        "read your own data once: how much, how long, which rows cannot be used, what splits share (exit code 2)",
        (check_example, "anyexperts data check tiny --data mine=chats.jsonl --near 0.8 --out runs/check"),
    )
    add_config(check)
    add_data(check, "your own data: a file, pattern, folder or address; repeatable")
    workers = "processes that read in parallel (default: by the amount of data, up to one per core)"
    check.add_argument("--workers", type=positive, metavar="N", help=workers)
    near = "report texts in two splits that share this part of their word shingles, as 0.8 (default: only equal texts)"
    check.add_argument("--near", type=positive_number, metavar="SHARE", help=near)
    check.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/check"), help="folder for the plot of lengths"
    )
    check.set_defaults(command=run_check)
    export = add_command(actions, "export", "write a generated domain as ArrayRecord files", (export_example,))
    export.add_argument("domain", help="the domain, as nlp")
    export.add_argument("folder", type=pathlib.Path, help="where to write; a second split may go into the same folder")
    export.add_argument("--split", default="train", choices=splits, help="the split to write")
    export.add_argument("--count", type=positive, default=1000, help="examples to write")
    export.add_argument("--seed", type=seed, default=0, help="seed of the examples, like data.seed of a run")
    export.add_argument("--shards", type=positive, default=1, help="files to spread them over")
    export.set_defaults(command=run_export)

"""`anyexperts data show` and `anyexperts data export`."""

import argparse
import dataclasses
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyexperts_jax.data.config import DataConfig


def run_show(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.show import show_domain

    config = _mixture(options)
    for name in config.domains:
        show_domain(config, name, options.split, options.count, options.out, start=options.start)


def _mixture(options: argparse.Namespace) -> "DataConfig":
    """The domains to show: those of --config or the generated ones, and the folders of --data."""
    from anyexperts_jax.core.errors import comma_list, require
    from anyexperts_jax.data.config import DataConfig, named_paths
    from anyexperts_jax.data.domain import DOMAIN_NAMES

    if options.config is None:
        config = DataConfig()
    else:
        from anyexperts_jax.train.config import load_config

        path = pathlib.Path(options.config)
        config = load_config(path / "config.json" if path.is_dir() else options.config).data
    given = named_paths(options.data, "--data")
    folders = config.folder_paths() | given
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


def run_export(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.array_records import export_array_record
    from anyexperts_jax.data.source import GeneratedSource

    source = GeneratedSource(options.domain, options.split, options.count, options.seed, (1, 2, 3))
    folder = export_array_record(source, options.folder, options.split, shards=options.shards)
    print(f"{options.count} examples of {options.domain}/{options.split} in {folder}")


def add(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="look at the five domains, or write them to disk")
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print and draw examples (PNG, WAV)")
    show.add_argument("domain", nargs="*", help="domains (default: all of --config and --data, or all five)")
    own = "a domain of your own, in a folder; repeatable"
    show.add_argument("--data", action="append", default=[], metavar="NAME=PATH", help=own)
    show.add_argument("--config", help="take the domains of a preset, a TOML file or a run")
    show.add_argument("--split", default="train", choices=("train", "validation", "test"))
    show.add_argument("--count", type=int, default=12)
    show.add_argument("--start", type=int, default=0)
    show.add_argument("--seed", type=int, help="of generated examples (default: the configuration's, or 0)")
    show.add_argument("--level", type=int, nargs="+", choices=(1, 2, 3))
    show.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/data"))
    show.set_defaults(command=run_show)
    export = actions.add_parser("export", help="write a generated domain as ArrayRecord files")
    export.add_argument("domain")
    export.add_argument("folder", type=pathlib.Path)
    export.add_argument("--split", default="train", choices=("train", "validation", "test"))
    export.add_argument("--count", type=int, default=1000)
    export.add_argument("--seed", type=int, default=0)
    export.add_argument("--shards", type=int, default=1)
    export.set_defaults(command=run_export)

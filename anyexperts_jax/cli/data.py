"""`anyexperts data show` and `anyexperts data export`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_command, natural, positive, seed


def run_show(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.domain import DOMAIN_NAMES
    from anyexperts_jax.data.show import show

    for name in options.domain or DOMAIN_NAMES:
        show(
            name,
            options.split,
            options.count,
            options.out,
            start=options.start,
            seed=options.seed,
            levels=options.level or (1, 2, 3),
        )


def run_export(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.array_records import export_array_record
    from anyexperts_jax.data.source import GeneratedSource

    source = GeneratedSource(options.domain, options.split, options.count, options.seed, (1, 2, 3))
    folder = export_array_record(source, options.folder, options.split, shards=options.shards)
    print(f"{options.count} examples of {options.domain}/{options.split} in {folder}")


def add(commands: argparse._SubParsersAction) -> None:
    show_example = "anyexperts data show ocr speech --level 1 --out runs/data"
    export_example = "anyexperts data export nlp folder --split validation --count 500"
    data = add_command(
        commands, "data", "look at the five domains, or write them to disk", (show_example, export_example)
    )
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    splits = ("train", "validation", "test")
    show = add_command(actions, "show", "print and draw examples (PNG, WAV)", (show_example,))
    show.add_argument("domain", nargs="*", help="domains (default: all five)")
    show.add_argument("--split", default="train", choices=splits, help="that the examples are of")
    show.add_argument("--count", type=int, default=12, help="examples of each domain")
    show.add_argument("--start", type=natural, default=0, help="number of the first one, from 0")
    show.add_argument("--seed", type=seed, default=0, help="of the examples, as data.seed of a run")
    show.add_argument("--level", type=int, nargs="+", choices=(1, 2, 3), help="difficulties (default: all three)")
    show.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/data"), help="for pictures and sound")
    show.set_defaults(command=run_show)
    export = add_command(actions, "export", "write a generated domain as ArrayRecord files", (export_example,))
    export.add_argument("domain", help="the domain, as nlp")
    export.add_argument("folder", type=pathlib.Path, help="where to write; a second split may go into the same folder")
    export.add_argument("--split", default="train", choices=splits, help="the split to write")
    export.add_argument("--count", type=positive, default=1000, help="examples to write")
    export.add_argument("--seed", type=seed, default=0, help="of the examples, as data.seed of a run")
    export.add_argument("--shards", type=positive, default=1, help="files to spread them over")
    export.set_defaults(command=run_export)

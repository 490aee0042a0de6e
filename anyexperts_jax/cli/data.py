"""`anyexperts data show` and `anyexperts data export`."""

import argparse
import pathlib


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
    data = commands.add_parser("data", help="look at the five domains, or write them to disk")
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print and draw examples (PNG, WAV)")
    show.add_argument("domain", nargs="*", help="domains (default: all five)")
    show.add_argument("--split", default="train", choices=("train", "validation", "test"))
    show.add_argument("--count", type=int, default=12)
    show.add_argument("--start", type=int, default=0)
    show.add_argument("--seed", type=int, default=0)
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

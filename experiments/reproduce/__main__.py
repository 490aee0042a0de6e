"""`python -m experiments.reproduce`: the papers' tables and figures, over seeds, with verdicts."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from anyexperts_jax.cli.main import run_command
from anyexperts_jax.cli.options import Parser, add_set, positive, positive_number, say, seed

EXAMPLES = """examples:
  python -m experiments.reproduce figure3 --workers 2 --deadline 3600
  python -m experiments.reproduce all --only tables --readme page.md"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, as `anyexperts` does."""
    return run_command(_parser().parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    from experiments.reproduce.command import Request, reproduce

    fields = (field.name for field in dataclasses.fields(Request))
    reproduce(Request(**{name: getattr(options, name) for name in fields}), note=say)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m experiments.reproduce",
        description="The paper's tables and figures, over seeds, with verdicts.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "tables",
        nargs="+",
        metavar="table",
        help="table1 table2 table3 figure3 figure4 figure5 or all; evomoe-components -routers -diversity -beta "
        "-experts -slots or evomoe; or TOML files",
    )
    parser.add_argument("--scale", default="tiny", help="tiny: two cores; small: one accelerator")
    parser.add_argument("--runs", type=pathlib.Path, help="where runs are kept (default: runs/reproduce)")
    parser.add_argument("--workers", type=positive, help="runs side by side (default: cores; at --scale small 1)")
    parser.add_argument(
        "--deadline",
        type=positive_number,
        metavar="SECONDS",
        help="stop then; the same command goes on (default: never)",
    )
    parser.add_argument("--quick", action="store_true", help="few steps and one seed: does it work, not what it says")
    parser.add_argument(
        "--seeds",
        type=seed,
        nargs="+",
        help="make the runs of these alone: a share for each of several hosts (default: all)",
    )
    add_set(parser, "override in every run; repeatable")
    parser.add_argument(
        "--only", choices=("runs", "tables"), help="make the runs alone, or tables of what is done (default: both)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="of tables (default: in experiments/results/reproduce)")
    parser.add_argument(
        "--readme",
        type=pathlib.Path,
        help="also write the block between the markers of this page, as of docs/results (default: none)",
    )
    parser.set_defaults(command=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())

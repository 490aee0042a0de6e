"""`anyexperts report`."""

import argparse
import pathlib


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.report.page import report

    print(f"report: {report(options.run)}")


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="write one HTML page and pictures about a run")
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    parser.set_defaults(command=run)

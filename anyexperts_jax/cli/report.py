"""`anyexperts report`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_command, add_mesh, mesh_of


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.report.page import report

    print(f"report: {report(options.run, mesh=mesh_of(options))}")


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands, "report", "write one HTML page and pictures about a run", ("anyexperts report runs/mine",)
    )
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    add_mesh(parser)
    parser.set_defaults(command=run)

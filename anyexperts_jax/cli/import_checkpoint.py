"""`anyexperts import`."""

import argparse

from anyexperts_jax.cli.options import add_checkpoint, add_command, add_mesh, mesh_of


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.pretrained.load import open_checkpoint
    from anyexperts_jax.pretrained.read import read_parameters, summary

    found = open_checkpoint(options.path)
    plan = found.plan(mesh_of(options))
    if options.dry_run:
        print_tables([plan.table(found.source)], Console(highlight=False), lines=True)
    else:
        read_parameters(plan, found.source)
    print("\n".join(summary(plan, found.name)))
    print("no weight was read" if options.dry_run else "all weights were read")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands,
        "import",
        "read a published checkpoint, and describe it",
        ("anyexperts import models/Qwen3-0.6B", "anyexperts import model.gguf --dry-run"),
    )
    add_checkpoint(parser)
    add_mesh(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print which tensor becomes which parameter, and read no weights"
    )
    parser.set_defaults(command=run)

"""`anyexperts export`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_checkpoint, add_command, positive_number


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.pretrained.load import load_pretrained
    from anyexperts_jax.pretrained.write import export

    model = load_pretrained(options.path)
    export(model, options.out, options.form, int(options.shard_gb * 10**9))
    print(f"wrote {options.out}")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands,
        "export",
        "write a published checkpoint in the hub's layout",
        ("anyexperts export model.gguf models/mine", "anyexperts export models/theirs models/mine --shard-gb 2"),
    )
    add_checkpoint(parser)
    parser.add_argument("out", type=pathlib.Path, help="a new folder")
    parser.add_argument(
        "--form",
        default="hub",
        choices=("hub", "anyexperts"),
        help="hub: a tensor for each expert; anyexperts: for attached slots or split networks, with what the hub's "
        "layout has no place for beside it",
    )
    parser.add_argument(
        "--shard-gb", type=positive_number, default=5.0, metavar="GB", help="size limit of a weight file"
    )
    parser.set_defaults(command=run)

"""`anyexperts attach`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_checkpoint, add_command, natural, positive_number, seed


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.pretrained.attach import attach
    from anyexperts_jax.pretrained.load import load_pretrained
    from anyexperts_jax.pretrained.write import export, require_new_folder

    require_new_folder(options.out)
    model = attach(
        load_pretrained(options.path),
        k_min=options.k_min,
        k_max=options.k_max,
        num_virtual=options.virtual,
        preserve=not options.paper,
        seed=options.seed,
    )
    export(model, options.out, "anyexperts")
    start = "with the paper's initial values" if options.paper else "computing what the base computes"
    print(f"wrote {options.out}: {options.k_min:g} to {options.k_max:g} slots, {start}")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands,
        "attach",
        "give a published mixture of experts variable slots",
        (
            "anyexperts attach models/Qwen3-30B-A3B models/mine --k-min 8 --k-max 12 --virtual 64",
            "anyexperts attach models/Qwen3-30B-A3B models/mine --k-min 8 --k-max 12 --virtual 64 --paper",
        ),
    )
    add_checkpoint(parser)
    parser.add_argument("out", type=pathlib.Path, help="a new folder; other tools read the base in it")
    parser.add_argument("--k-min", type=positive_number, required=True, metavar="K", help="slots at importance 0")
    parser.add_argument("--k-max", type=positive_number, required=True, metavar="K", help="slots at importance 1")
    parser.add_argument("--virtual", type=natural, default=0, metavar="V", help="virtual experts per layer")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="start as the paper does (default: the first forward pass is the base's, bit for bit in float32)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the new parameters")
    parser.set_defaults(command=run)

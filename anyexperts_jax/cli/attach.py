"""`anyexperts attach`."""

import argparse
import functools

from anyexperts_jax.cli.conversion import add_conversion, convert
from anyexperts_jax.cli.options import natural, positive_number, seed


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.pretrained.attach import attach

    change = functools.partial(
        attach,
        k_min=options.k_min,
        k_max=options.k_max,
        num_virtual=options.virtual,
        preserve=not options.paper,
        seed=options.seed,
    )
    convert(options, change, "anyexperts")
    start = "with the paper's initial values" if options.paper else "computing what the base computes"
    print(f"wrote {options.out}: {options.k_min:g} to {options.k_max:g} slots, {start}")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_conversion(
        commands,
        "attach",
        "give a published mixture of experts, or a split model, variable slots",
        (
            "anyexperts attach models/Qwen3-30B-A3B models/mine --k-min 8 --k-max 12 --virtual 64",
            "anyexperts attach models/Qwen3-30B-A3B models/mine --k-min 8 --k-max 12 --virtual 64 --paper",
        ),
        out="a new folder; other tools read it as the base model",
    )
    parser.add_argument("--k-min", type=positive_number, required=True, metavar="K", help="slots at importance 0")
    parser.add_argument("--k-max", type=positive_number, required=True, metavar="K", help="slots at importance 1")
    parser.add_argument("--virtual", type=natural, default=0, metavar="V", help="virtual experts per layer")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="start as the paper does (default: the first forward pass equals the base's, bit for bit in float32)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the new parameters")
    parser.set_defaults(command=run)

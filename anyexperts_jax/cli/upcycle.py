"""`anyexperts upcycle`."""

import argparse
import functools

from anyexperts_jax.cli.conversion import add_conversion, convert
from anyexperts_jax.cli.options import natural, positive, seed


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.evolution.published import upcycle

    change = functools.partial(
        upcycle,
        num_experts=options.experts,
        experts_per_token=options.experts_per_token,
        moe_every=options.moe_every,
        num_dense_layers=options.dense_layers,
        init=options.init,
        seed=options.seed,
    )
    model = convert(options, change)
    layers, name = model.config.stack.num_moe_layers, model.hub.values["architectures"][0]
    print(f"wrote {options.out}: {name}, {layers} layers with {options.experts} experts")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_conversion(
        commands,
        "upcycle",
        "make a mixture of experts from a published dense model: copies of its networks, and a new router",
        (
            "anyexperts upcycle models/Qwen3-0.6B models/mixture --experts 8",
            "anyexperts upcycle models/Qwen3-0.6B models/mixture --experts 4 --moe-every 2 --init random_subset",
        ),
        out="a new folder in the hub's layout, which `anyexperts train` accepts",
    )
    parser.add_argument("--experts", type=positive, default=4, metavar="E", help="experts per layer")
    parser.add_argument("--experts-per-token", type=positive, default=2, metavar="K", help="experts per token")
    parser.add_argument(
        "--moe-every", type=positive, default=1, metavar="N", help="every N-th layer gets experts; only for Qwen3"
    )
    parser.add_argument(
        "--dense-layers", type=natural, default=0, metavar="N", help="leading layers without experts; only for Qwen3"
    )
    parser.add_argument(
        "--init",
        default="copy",
        choices=("copy", "noise", "dropout", "random_subset"),
        help="how all experts but the first differ from the dense network; copy: not at all, so the model computes "
        "what the dense one does",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the router and of these differences")
    parser.set_defaults(command=run)

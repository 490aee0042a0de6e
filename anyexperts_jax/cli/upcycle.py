"""`anyexperts upcycle`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_checkpoint, add_command, natural, positive, seed


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.evolution.published import upcycle
    from anyexperts_jax.pretrained.load import load_pretrained
    from anyexperts_jax.pretrained.write import export, require_new_folder

    require_new_folder(options.out)
    model = upcycle(
        load_pretrained(options.path),
        num_experts=options.experts,
        experts_per_token=options.experts_per_token,
        moe_every=options.moe_every,
        num_dense_layers=options.dense_layers,
        init=options.init,
        seed=options.seed,
    )
    export(model, options.out)
    layers, name = model.config.stack.num_moe_layers, model.hub.values["architectures"][0]
    print(f"wrote {options.out}: {name}, {layers} layers with {options.experts} experts")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands,
        "upcycle",
        "make a mixture of experts from a published dense model: copies of its networks, and a new router",
        (
            "anyexperts upcycle models/Qwen3-0.6B models/mixture --experts 8",
            "anyexperts upcycle models/Qwen3-0.6B models/mixture --experts 4 --moe-every 2 --init random_subset",
        ),
    )
    add_checkpoint(parser)
    parser.add_argument("out", type=pathlib.Path, help="a new folder, in the hub's layout; `anyexperts train` takes it")
    parser.add_argument("--experts", type=positive, default=4, metavar="E", help="experts of a layer")
    parser.add_argument("--experts-per-token", type=positive, default=2, metavar="K", help="experts of a token")
    parser.add_argument(
        "--moe-every", type=positive, default=1, metavar="N", help="every N-th layer gets experts; of Qwen3 only"
    )
    parser.add_argument(
        "--dense-layers", type=natural, default=0, metavar="N", help="leading layers without; of Qwen3 only"
    )
    parser.add_argument(
        "--init",
        default="copy",
        choices=("copy", "noise", "dropout", "random_subset"),
        help="how all experts but the first differ from the network; copy: not at all, and the mixture computes "
        "what the dense model does",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the router and of the differences")
    parser.set_defaults(command=run)

"""`anyexperts split`."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from anyexperts_jax.cli.conversion import add_conversion, convert
from anyexperts_jax.cli.options import natural, positive, say, seed

if TYPE_CHECKING:
    from anyexperts_jax.pretrained.model import Pretrained


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.core.files import read_text
    from anyexperts_jax.pretrained.split import split

    text = None if options.text is None else read_text(options.text, "--text")

    def change(base: "Pretrained") -> "Pretrained":
        if text is None:
            say("without --text neurons are compared on random tokens, which say little about real text")
        say(f"grouping the neurons of {base.config.stack.num_layers} layers")
        return split(
            base,
            num_experts=options.experts,
            num_shared=options.shared,
            text=text,
            method=options.method,
            markers=options.markers,
            seed=options.seed,
        )

    model = convert(options, change, "anyexperts", note=say)
    width = model.config.stack.expert_d_ff
    print(f"wrote {options.out}: {options.experts} experts of {width} neurons, {options.shared} of them shared")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_conversion(
        commands,
        "split",
        "cut the dense networks of a published model into experts",
        (
            "anyexperts split model.gguf models/mine --experts 24 --shared 4 --text sample.txt",
            "anyexperts split model.gguf models/random --experts 24 --method random",
        ),
        out="a new folder; other tools read it as the dense model",
    )
    parser.add_argument(
        "--experts",
        type=positive,
        required=True,
        metavar="E",
        help="groups of neurons; must divide the network's width",
    )
    parser.add_argument(
        "--shared", type=natural, default=0, metavar="S", help="how many of these groups serve every token"
    )
    parser.add_argument(
        "--text",
        type=pathlib.Path,
        metavar="FILE",
        help="text on which activations are compared to group the neurons (default: random ids)",
    )
    parser.add_argument(
        "--method",
        default="activations",
        choices=("activations", "random", "contiguous"),
        help="activations: group neurons that are active on the same tokens; the others are baselines",
    )
    parser.add_argument(
        "--markers",
        type=positive,
        default=4,
        metavar="M",
        help="neurons of an expert by which the router predicts its output",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of random groups and tokens")
    parser.set_defaults(command=run)

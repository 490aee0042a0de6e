"""`anyexperts split`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_checkpoint, add_command, natural, positive, say, seed


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.core.files import read_text
    from anyexperts_jax.pretrained.load import load_pretrained
    from anyexperts_jax.pretrained.split import split
    from anyexperts_jax.pretrained.write import export, require_new_folder

    require_new_folder(options.out)
    text = None if options.text is None else read_text(options.text, "--text")
    if text is None:
        say("without --text neurons are compared on random tokens, which say little about real text")
    say(f"reading {options.path}")
    base = load_pretrained(options.path)
    say(f"grouping the neurons of {base.config.stack.num_layers} layers")
    model = split(
        base,
        num_experts=options.experts,
        num_shared=options.shared,
        text=text,
        method=options.method,
        markers=options.markers,
        seed=options.seed,
    )
    export(model, options.out, "anyexperts")
    width = model.config.stack.expert_d_ff
    print(f"wrote {options.out}: {options.experts} experts of {width} neurons, {options.shared} of them shared")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands,
        "split",
        "cut the dense networks of a published model into experts",
        (
            "anyexperts split model.gguf models/mine --experts 24 --shared 4 --text sample.txt",
            "anyexperts split model.gguf models/random --experts 24 --method random",
        ),
    )
    add_checkpoint(parser)
    parser.add_argument("out", type=pathlib.Path, help="a new folder; other tools read the dense model in it")
    parser.add_argument(
        "--experts", type=positive, required=True, metavar="E", help="groups of neurons; divides the network's width"
    )
    parser.add_argument("--shared", type=natural, default=0, metavar="S", help="of these, groups for every token")
    parser.add_argument(
        "--text",
        type=pathlib.Path,
        metavar="FILE",
        help="text on which neurons are compared to group them (default: random ids)",
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
        help="neurons by which the router predicts an expert's output",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of random groups and tokens")
    parser.set_defaults(command=run)

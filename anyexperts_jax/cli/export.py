"""`anyexperts export`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_command, positive, positive_number


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.core.files import read_text
    from anyexperts_jax.pretrained.write import export, require_new_folder
    from anyexperts_jax.train.published import load_published

    require_new_folder(options.out)
    text = None if options.text is None else read_text(options.text, "--text")
    model = load_published(options.path, options.checkpoint, adapter=options.adapter)
    form = options.conversion or options.form
    how = {"shard_bytes": int(options.shard_gb * 10**9), "text": text, "experts": options.experts_per_token}
    export(model, options.out, form, **how)
    print(f"wrote {options.out}")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands,
        "export",
        "write a published checkpoint, or a run that started from one, in the hub's layout",
        (
            "anyexperts export model.gguf models/mine",
            "anyexperts export models/theirs models/mine --shard-gb 2",
            "anyexperts export runs/tuned models/tuned",
            "anyexperts export runs/tuned adapters/mine --form adapter",
            "anyexperts export models/theirs models/mine --adapter adapters/mine",
            "anyexperts export runs/tuned models/static --as plain --text sample.txt",
        ),
    )
    parser.add_argument(
        "path", type=pathlib.Path, help="a folder with config.json and safetensors, a GGUF file, or a run"
    )
    parser.add_argument("out", type=pathlib.Path, help="a new folder")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument(
        "--form",
        default="hub",
        choices=("hub", "anyexperts", "adapter"),
        metavar="FORM",
        help="hub: the layout of published checkpoints; anyexperts: for attached slots or split networks, the base in "
        "that layout with the other parameters beside it; adapter: only a run's low-rank adapter (the others merge it)",
    )
    forms.add_argument(
        "--as",
        dest="conversion",
        choices=("plain", "zeda", "longcat"),
        metavar="TOOL",
        help="convert a model with variable slots for other tools, with a model card: plain, one number of experts for "
        "all tokens, which is another function; zeda, the same function for ZEDA's class, or refused; longcat, "
        "always refused so far (default: none, the form is --form)",
    )
    parser.add_argument(
        "--text",
        type=pathlib.Path,
        metavar="FILE",
        help="with --as, the text on which the card's difference is measured (default: random ids)",
    )
    parser.add_argument(
        "--experts-per-token",
        type=positive,
        metavar="K",
        help="with --as plain, experts per token (default: as many as before the model got variable slots)",
    )
    parser.add_argument(
        "--adapter", type=pathlib.Path, metavar="DIR", help="an adapter to merge into the model (default: none)"
    )
    parser.add_argument(
        "--checkpoint",
        default="best",
        choices=("best", "last"),
        help="checkpoint of a run: the one with the lowest validation loss, or the latest",
    )
    parser.add_argument(
        "--shard-gb", type=positive_number, default=5.0, metavar="GB", help="size limit of a weight file"
    )
    parser.set_defaults(command=run)

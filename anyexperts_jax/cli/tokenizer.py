"""`anyexperts tokenizer train` and `anyexperts tokenizer show`."""

import argparse
import pathlib

from anyexperts_jax.cli.options import add_command, positive, say
from anyexperts_jax.core.errors import require


def run_train(options: argparse.Namespace) -> None:
    from anyexperts_jax.tokenizers.show import describe
    from anyexperts_jax.tokenizers.store import save_tokenizer
    from anyexperts_jax.tokenizers.train import read_lines, train_tokenizer

    taken = options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir()))
    require(not taken, f"--out {options.out} exists and is not empty; name a new folder")
    tokenizer = train_tokenizer(
        read_lines(options.files), options.vocab_size, name=options.out.resolve().name, special=options.special
    )
    if tokenizer.vocab_size < options.vocab_size:
        say(f"the text holds too few pairs to merge for {options.vocab_size} ids: {tokenizer.vocab_size} were made")
    save_tokenizer(tokenizer, options.out)
    print("\n".join([*describe(tokenizer), f"wrote {options.out}"]))


def run_show(options: argparse.Namespace) -> None:
    from rich.console import Console

    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.tokenizers.show import describe, summary, token_table
    from anyexperts_jax.tokenizers.store import open_tokenizer

    tokenizer = open_tokenizer(options.tokenizer)
    print("\n".join(describe(tokenizer)))
    if options.text is not None:
        tokens = tokenizer.encode(options.text)
        print_tables([token_table(tokenizer, tokens)], Console(highlight=False), lines=True)
        print(summary(options.text, tokens))


def add(commands: argparse._SubParsersAction) -> None:
    train_example = "anyexperts tokenizer train corpus.txt --vocab-size 8192 --out tokenizers/corpus"
    show_example = "anyexperts tokenizer show tokenizers/corpus --text 'Hello world'"
    tokenizer = add_command(
        commands, "tokenizer", "train a tokenizer on text, or show one", (train_example, show_example)
    )
    actions = tokenizer.add_subparsers(title="actions", required=True, metavar="ACTION")
    train = add_command(actions, "train", "train byte-level BPE on text files", (train_example,))
    train.add_argument("files", nargs="+", type=pathlib.Path, help="UTF-8 text files, also compressed as .gz")
    train.add_argument(
        "--vocab-size",
        type=positive,
        required=True,
        metavar="N",
        help="number of ids, including special tokens and bytes",
    )
    train.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="a new folder for tokenizer.json")
    train.add_argument(
        "--special",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="further special tokens, as <|im_start|> (default: none)",
    )
    train.set_defaults(command=run_train)
    show = add_command(
        actions,
        "show",
        "print a tokenizer's size, special tokens and fingerprint, and how it encodes a text",
        (show_example,),
    )
    show.add_argument("tokenizer", help="bytes, a folder with tokenizer.json, or a GGUF file")
    show.add_argument("--text", help="a text to encode (default: none)")
    show.set_defaults(command=run_show)

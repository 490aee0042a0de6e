"""`anyexperts evaluate` with a published checkpoint instead of a run: on a text, or on records with media."""

import argparse
import pathlib
import shlex

from anyexperts_jax.cli.options import mesh_of, positive, say
from anyexperts_jax.core.errors import require


def run(options: argparse.Namespace) -> None:
    """Measures the model on --text or --data, at each budget with each policy."""
    unused = [f"--{name}" for name in ("domain", "metric") if getattr(options, name)]
    require(not unused, f"{' '.join(unused)}: {options.run} is a published checkpoint; give --text or --data")
    given = (options.text is not None) + bool(options.data)
    require(given == 1, f"{options.run} is a published checkpoint; give --text FILE or --data NAME=PATH")
    if options.data:
        _measure_records(options)
    else:
        _measure_text(options)


def _measure_records(options: argparse.Namespace) -> None:
    from rich.console import Console

    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.data.config import named_places
    from anyexperts_jax.evaluate.media_policies import measure_records, media_table
    from anyexperts_jax.evaluate.records import read_records
    from anyexperts_jax.pretrained.load import load_pretrained

    require(options.page is None, "--page: only with --text")
    places = named_places(options.data, "--data")
    say(f"reading {options.run}")
    model = load_pretrained(options.run, mesh_of(options))
    for name, place in places.items():
        batches = read_records(model, place, options.examples, options.batch_rows)
        found = measure_records(model, batches, options.budget or (), options.policy or (), note=say)
        print_tables([media_table(found, f"{name}: the answers of {place}")], Console(highlight=False))


def _measure_text(options: argparse.Namespace) -> None:
    from rich.console import Console

    from anyexperts_jax.core.files import read_text
    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.evaluate.policies import measure_policies, table, text_sample
    from anyexperts_jax.report.policy_page import write_policy_page
    from anyexperts_jax.train.published import load_published

    text = read_text(options.text, "--text")
    say(f"reading {options.run}")
    model = load_published(options.run, options.checkpoint, mesh_of(options), adapter=options.adapter)
    sample = text_sample(model, text, options.tokens, options.length)
    found = measure_policies(
        model, sample, options.budget or (), options.policy or (), batch_rows=options.batch_rows, note=say
    )
    rows, length = sample.tokens_BT.shape
    where = f"{options.text}: {rows} rows of {length} tokens"
    print_tables([table(found, where)], Console(highlight=False))
    if options.page is not None:
        write_policy_page(found, options.page, where, _command(options))
        print(f"wrote {options.page / 'README.md'} and the curves beside it")


def _command(options: argparse.Namespace) -> str:
    """Returns the command with all options that the figures depend on."""
    words = ["anyexperts", "evaluate", str(options.run), "--text", str(options.text)]
    words += ["--budget", *(f"{budget:g}" for budget in options.budget)] if options.budget else []
    words += ["--policy", *options.policy] if options.policy else []
    words += [] if options.adapter is None else ["--adapter", str(options.adapter)]
    words += ["--mesh", *options.mesh] if options.mesh else []
    for name in ("tokens", "length", "batch_rows"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return shlex.join(words)


def add_options(parser: argparse.ArgumentParser) -> None:
    from anyexperts_jax.core.registries import POLICIES

    group = parser.add_argument_group("with a published checkpoint (a folder or a GGUF file) instead of a run")
    group.add_argument(
        "--text",
        type=pathlib.Path,
        metavar="FILE",
        help="text on which the model is measured (default: none; --data is for records)",
    )
    group.add_argument(
        "--policy",
        nargs="+",
        metavar="NAME",
        help=f"what decides a token's number of experts: {', '.join(POLICIES.names())}, static_layers, modes, oracle; "
        "dense: the model before the split; importance for attached slots (default: all that fit the model)",
    )
    group.add_argument(
        "--adapter",
        type=pathlib.Path,
        metavar="FOLDER",
        help="a low-rank adapter added to the weights, with --text or --tasks (default: none)",
    )
    group.add_argument(
        "--tokens", type=positive, default=4096, metavar="N", help="tokens of the text to use, from its beginning"
    )
    group.add_argument("--length", type=positive, default=256, metavar="T", help="largest number of tokens of a row")
    group.add_argument("--batch-rows", type=positive, default=4, metavar="B", help="rows, or records, per batch")
    group.add_argument(
        "--page", type=pathlib.Path, metavar="FOLDER", help="also write the table and its curves there (default: none)"
    )

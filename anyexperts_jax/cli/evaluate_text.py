"""`anyexperts evaluate` with a published checkpoint instead of a run."""

import argparse
import pathlib
import shlex

from anyexperts_jax.cli.options import mesh_of, positive, say
from anyexperts_jax.core.errors import require


def run(options: argparse.Namespace) -> None:
    """Measures the model on --text, at each budget with each policy."""
    from rich.console import Console

    from anyexperts_jax.core.files import read_text
    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.evaluate.policies import measure_policies, table, text_sample
    from anyexperts_jax.report.policy_page import write_policy_page
    from anyexperts_jax.train.published import load_published

    unused = [f"--{name}" for name in ("domain", "data", "metric") if getattr(options, name)]
    require(not unused, f"{' '.join(unused)}: {options.run} is a published checkpoint; give --text")
    require(options.text is not None, f"{options.run} is a published checkpoint; give --text FILE")
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
        "--text", type=pathlib.Path, metavar="FILE", help="text on which the model is measured (default: none)"
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
    group.add_argument("--batch-rows", type=positive, default=4, metavar="B", help="rows per batch")
    group.add_argument(
        "--page", type=pathlib.Path, metavar="FOLDER", help="also write the table and its curves there (default: none)"
    )

"""`python -m experiments.dial`: a dense model split into experts and self-distilled to budgets, by policy."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from anyexperts_jax.cli.main import run_command
from anyexperts_jax.cli.options import Parser, add_set, natural, positive, positive_number, say, seed

EXAMPLES = """examples:
  python -m experiments.own_data.articles PATH runs/articles
  python -m experiments.dial --model MODEL --train runs/articles/train.jsonl --test runs/articles/test.jsonl
  python -m experiments.dial --model MODEL --train runs/articles/train.jsonl --test runs/articles/test.jsonl --times"""
_SIZES = (
    ("experts", "experts that a network is cut into; must divide its width"),
    ("steps", "steps of each training"),
    ("batch_size", "sequences of a step"),
    ("length", "tokens of a sequence"),
    ("test_tokens", "tokens of the test text, from its beginning"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, as `anyexperts` does."""
    return run_command(_parser().parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    from experiments.dial.command import run_plan, time_plan
    from experiments.dial.plan import Plan

    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Plan)}
    given: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in fields.items()}
    plan = Plan(**given)
    if options.times:
        time_plan(plan, options.rounds, options.patience, say)
    print(f"wrote {run_plan(plan, options.out or plan.run, say)}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m experiments.dial",
        description="Splits a dense model into experts, distils it from itself at several budgets, and compares "
        "policies. Finished trainings are used again, an interrupted one is resumed.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a dense checkpoint: a folder or a GGUF file")
    parser.add_argument(
        "--train", type=pathlib.Path, required=True, help="text to learn from: .txt, or .jsonl with text"
    )
    parser.add_argument("--test", type=pathlib.Path, required=True, help="text to measure on, in the same form")
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/dial"), help="where trainings are kept")
    parser.add_argument("--out", type=pathlib.Path, help="where page, curve and figures are written (default: --run)")
    from experiments.dial.plan import Plan

    default = {field.name: field.default for field in dataclasses.fields(Plan)}
    for name, text in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=default[name], metavar="N", help=text)
    parser.add_argument(
        "--shared", type=natural, default=default["shared"], metavar="N", help="how many serve every token"
    )
    parser.add_argument(
        "--virtual", type=natural, default=default["virtual"], metavar="N", help="virtual experts of attached slots"
    )
    parser.add_argument(
        "--width", type=positive_number, default=default["width"], help="of the window of attached slots, in slots"
    )
    parser.add_argument(
        "--budget",
        dest="budgets",
        type=positive,
        nargs="+",
        default=default["budgets"],
        metavar="K",
        help="real experts a token, without the shared ones (default: 18 15 12)",
    )
    parser.add_argument(
        "--seeds", type=seed, nargs="+", default=default["seeds"], help="of the trainings (default: 0 1 2)"
    )
    parser.add_argument("--lr", type=positive_number, default=default["lr"], help="largest learning rate of routers")
    parser.add_argument(
        "--importance-lr",
        type=positive_number,
        default=default["importance_lr"],
        help="the same of importance networks",
    )
    add_set(parser, "override in every training, as model.stack.dtype=bfloat16; repeatable")
    parser.add_argument(
        "--times", action="store_true", help="first measure seconds with finished checkpoints, on a quiet machine"
    )
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="rounds of --times")
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="SECONDS", help="how long --times waits for an idle machine"
    )
    parser.set_defaults(command=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())

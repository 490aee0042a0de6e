"""`anyexperts evaluate`."""

import argparse
import dataclasses

from anyexperts_jax.cli import evaluate_tasks, evaluate_text
from anyexperts_jax.cli.options import add_command, add_data, add_run, mesh_of, positive, positive_number, say


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.core.errors import require
    from anyexperts_jax.pretrained.load import is_checkpoint

    evaluate_tasks.require_its_options(options)
    if options.tasks is not None:
        evaluate_tasks.run(options)
    elif is_checkpoint(options.run):
        evaluate_text.run(options)
    else:
        given = [f"--{name}" for name in ("text", "policy", "page", "adapter") if getattr(options, name)]
        require(not given, f"{' '.join(given)}: {options.run} is no published checkpoint; a run has data of its own")
        _evaluate_run(options)


def _evaluate_run(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.config import named_places
    from anyexperts_jax.evaluate.evaluate import Options, evaluate
    from anyexperts_jax.report.tables import print_evaluation

    amounts = Options(num_examples=options.examples, calibration_examples=options.calibration_examples)
    amounts = dataclasses.replace(amounts, metrics=tuple(options.metric))
    what = (options.run, options.budget, options.domain)
    where = {"which": options.checkpoint, "mesh": mesh_of(options), "data": named_places(options.data, "--data")}
    evaluate(*what, **where, options=amounts, note=say, show=print_evaluation)


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "evaluate",
        "score a run, or a published model on a text or on records, at several budgets",
        (
            "anyexperts evaluate runs/mine --budget 4.8 6.4 8.0 9.6",
            "anyexperts evaluate runs/mine --metric mine=cer",
            "anyexperts evaluate models/mine --text wiki.txt --budget 2 4.5 --policy static top_p oracle",
            "anyexperts evaluate models/mine --data pictures=questions.jsonl --budget 4 6 --policy static top_p modes",
            "anyexperts evaluate runs/mine --domain ocr speech --examples 256 --checkpoint last",
            "anyexperts evaluate models/mine --tasks gsm8k,arc_easy --budget 4.8 8 --limit 100",
        ),
    )
    add_run(parser)
    parser.add_argument(
        "--budget",
        type=positive_number,
        nargs="+",
        metavar="K",
        help="real experts per token (default: four near the run's)",
    )
    parser.add_argument("--domain", nargs="+", help="domains to evaluate (default: those of --data, or all of the run)")
    add_data(
        parser,
        "your own data to evaluate on; the name of one of the run's domains replaces its place. With a published "
        "checkpoint: records whose answers are predicted from their questions and media; repeatable",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME=METRIC",
        help="score the domain NAME by exact, anls, wer, cer, f1, choice (the most likely of its type's answers) or a "
        "plugin's metric; repeatable (default: the metric of the run's data.metrics or of the data)",
    )
    parser.add_argument(
        "--examples", type=positive, default=64, help="number of test examples of each domain, or of records"
    )
    parser.add_argument(
        "--calibration-examples",
        type=positive,
        default=32,
        help="number of validation examples of each domain, on which the window is set",
    )
    evaluate_text.add_options(parser)
    evaluate_tasks.add_options(parser)
    parser.set_defaults(command=run)

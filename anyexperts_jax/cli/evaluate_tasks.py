"""`anyexperts evaluate --tasks`: tasks of EleutherAI's evaluation harness, or of lmms-eval."""

import argparse
import pathlib
import shlex
from typing import Any

from anyexperts_jax.cli.options import natural, positive, say
from anyexperts_jax.core.errors import require

HARNESSES = ("lm-eval", "lmms-eval")
_OTHERS = ("domain", "data", "metric", "text", "policy", "page", "mesh")  # options of other kinds of evaluation


def require_its_options(options: argparse.Namespace) -> None:
    """Checks that options which need --tasks are not given without it.

    Raises:
      UserError: naming them.
    """
    own: dict[str, Any] = {"include": [], "limit": None, "fewshot": None, "chat": False, "out": None}
    own["harness"] = HARNESSES[0]
    given = [f"--{name}" for name, default in own.items() if getattr(options, name) != default]
    require(options.tasks is not None or not given, f"{' '.join(given)}: only with --tasks")


def run(options: argparse.Namespace) -> None:
    """Scores a run or a published checkpoint on the tasks."""
    from rich.console import Console

    from anyexperts_jax.core.text_table import print_tables
    from anyexperts_jax.harness.lmms_run import evaluate_media_tasks, require_lmms
    from anyexperts_jax.harness.run import TaskOptions, evaluate_tasks, require_harness
    from anyexperts_jax.harness.scores import layer_table, modality_table, score_table, write_scores
    from anyexperts_jax.serve.model import load_served

    unused = [f"--{name}" for name in _OTHERS if getattr(options, name)]
    require(not unused, f"{' '.join(unused)}: not with --tasks")
    media = options.harness == "lmms-eval"
    require(not (media and options.chat), "--chat: not with --harness lmms-eval, whose prompts are conversations")
    (require_lmms if media else require_harness)()
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    budgets = options.budget or [None]
    most = max((budget for budget in budgets if budget is not None), default=None)
    beside = {} if options.adapter is None else {"adapter": options.adapter}
    model = load_served(options.run, options.checkpoint, most, adapters=beside)
    model = model.with_adapter("adapter") if beside else model
    how = TaskOptions(tuple(options.include), options.limit, options.fewshot, options.chat, rows=options.batch_rows)
    scores = (evaluate_media_tasks if media else evaluate_tasks)(model, tasks, budgets, how, note=say)
    title = f"{options.run}: tasks of {options.harness}"
    tables = [score_table(scores, title), layer_table(scores), modality_table(scores)]
    print_tables([table for table in tables if table is not None], Console(highlight=False))
    if options.out is not None:
        write_scores(scores, options.out, _command(options))
        print(f"wrote {options.out}")


def _command(options: argparse.Namespace) -> str:
    """Returns the command with all options that the scores depend on."""
    words = ["anyexperts", "evaluate", str(options.run), "--tasks", options.tasks, "--checkpoint", options.checkpoint]
    words += ["--harness", options.harness] if options.harness != HARNESSES[0] else []
    words += ["--budget", *(f"{budget:g}" for budget in options.budget)] if options.budget else []
    words += [] if options.adapter is None else ["--adapter", str(options.adapter)]
    words += [word for folder in options.include for word in ("--include", str(folder))]
    for name in ("limit", "fewshot"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join([*words, *(["--chat"] if options.chat else [])])


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with a harness's tasks instead of the run's own data or --text")
    group.add_argument("--tasks", metavar="NAME[,NAME]", help="names of tasks or groups of the harness (default: none)")
    group.add_argument(
        "--harness",
        choices=HARNESSES,
        default=HARNESSES[0],
        help="whose tasks: lm-eval's, of text, or lmms-eval's, of pictures, videos and sounds",
    )
    group.add_argument(
        "--include",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder with your own tasks in the harness's format; repeatable",
    )
    group.add_argument(
        "--limit", type=positive, metavar="N", help="largest number of examples of each task (default: all)"
    )
    group.add_argument(
        "--fewshot", type=natural, metavar="N", help="examples in the prompt (default: the task's own number)"
    )
    group.add_argument("--chat", action="store_true", help="render prompts with the model's chat template")
    group.add_argument("--out", type=pathlib.Path, metavar="FILE", help="also write the scores as JSON (default: none)")

"""`evaluate_tasks`: runs lm-eval's `simple_evaluate` on a model of this package, for each task and budget."""

import contextlib
import dataclasses
import difflib
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from anyexperts_jax.core.errors import UserError, comma_list, one_line, require
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.budget import mixes
from anyexperts_jax.routing.policies import IMPORTANCE
from anyexperts_jax.serve.model import ServedModel
from anyexperts_jax.serve.slots import row_budget
from anyexperts_jax.train.metrics import plain

_SHOWN_UNKNOWN = 4  # similar task names that an error message suggests


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """How tasks are run."""

    include: tuple[pathlib.Path, ...] = ()  # folders with the user's own tasks
    limit: int | None = None  # how many examples of each task; None: all
    fewshot: int | None = None  # examples in the prompt; None: the task's own number
    chat: bool = False  # whether prompts are rendered with the model's chat template
    rows: int = 8  # batch size
    length: int | None = None  # longest sequence; None: the model's positions


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """The score of a task at a budget, and how many experts it used.

    Attributes:
      score: lm-eval's value of `metric`; `standard_error` is nan if lm-eval reports none.
      examples: how many were scored.
      budget: requested real experts per token; None: the model's own window.
      realised: real experts used per token, mean over MoE layers; nan for a dense model.
      by_layer: real experts used per token in each MoE layer.
      policy: what decides how many experts a token gets.
      seconds: time of the whole task, compilation included.
    """

    task: str
    metric: str
    score: float
    standard_error: float
    higher_is_better: bool | None
    examples: int
    budget: float | None
    realised: float
    by_layer: tuple[float, ...]
    policy: str
    seconds: float


def evaluate_tasks(
    model: ServedModel,
    tasks: Sequence[str],
    budgets: Sequence[float | None] = (None,),
    options: TaskOptions = TaskOptions(),
    note: Callable[[str], None] = lambda line: None,
) -> list[TaskScore]:
    """Scores a model on lm-eval's tasks, or on the user's own in lm-eval's format.

    Args:
      tasks: names of tasks or groups.
      budgets: real experts per token; None: the model's own window.
      note: called with one line as each task begins.

    Raises:
      UserError: if lm-eval is not installed, a task is unknown or cannot be read, or the model cannot reach a budget.
    """
    require_harness()
    require(len(tasks) > 0, "--tasks names no task")
    for budget in budgets:
        row_budget(model.base, model.weights.config, budget)
    with _quiet():
        manager = _task_manager(options.include, tasks)
        return [
            score
            for task in tasks
            for budget in budgets
            for score in _evaluate(model, task, budget, options, manager=manager, note=note)
        ]


def require_harness() -> None:
    """Checks that the extra `harness` is installed.

    Raises:
      UserError: that says how to install it.
    """
    require_package("lm_eval", "harness", "--tasks needs")


def score_table(scores: Sequence[TaskScore], title: str) -> TextTable:
    """Returns the table of scores that is printed."""
    columns = ("task", "metric", "budget", "score", "± error", "real experts", "examples", "seconds", "policy")
    rows = [
        (
            one.task,
            one.metric,
            "own" if one.budget is None else f"{one.budget:g}",
            f"{one.score:.4f}",
            "-" if math.isnan(one.standard_error) else f"{one.standard_error:.4f}",
            "dense" if math.isnan(one.realised) else f"{one.realised:.2f}",
            str(one.examples),
            f"{one.seconds:.1f}",
            one.policy,
        )
        for one in scores
    ]
    return TextTable(title, columns, tuple(rows), names=2)


def layer_table(scores: Sequence[TaskScore]) -> TextTable | None:
    """Returns a table of real experts per token in each MoE layer; None for a dense model."""
    measured = {(one.task, one.budget): one for one in scores if one.by_layer}
    if not measured:
        return None
    layers = max(len(one.by_layer) for one in measured.values())
    rows = [
        (task, "own" if budget is None else f"{budget:g}", *(f"{real:.2f}" for real in one.by_layer))
        for (task, budget), one in measured.items()
    ]
    return TextTable(
        "real experts per token, by MoE layer", ("task", "budget", *map(str, range(layers))), tuple(rows), names=2
    )


def write_scores(scores: Sequence[TaskScore], path: pathlib.Path, command: str) -> None:
    """Writes the scores as JSON; nan becomes null."""
    rows = plain([dataclasses.asdict(one) for one in scores])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "scores": rows}, indent=2) + "\n", encoding="utf-8")


def policy_name(config: ModelConfig, budget: float | None) -> str:
    """Names, for a table, what decides how many experts a token gets."""
    if config.stack.num_moe_layers == 0:
        return "dense"
    if not mixes(config) or config.moe.policy != IMPORTANCE:
        return config.moe.policy
    return "static" if budget is None or budget == round(budget) else "static, mixed by position"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm-eval's progress log while the block runs; what it prints about tasks stays."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _task_manager(include: Sequence[pathlib.Path], tasks: Sequence[str]) -> Any:
    """Returns lm-eval's index of tasks. If the user's folders hold all tasks, its own large index is not built."""
    from lm_eval.tasks import TaskManager

    for folder in include:
        require(folder.is_dir(), f"--include {folder} is no folder")
    folders = [str(folder) for folder in include] or None
    if folders:
        own = TaskManager(include_path=folders, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=folders)
    _require_known(manager, tasks)
    return manager


def _require_known(manager: Any, tasks: Sequence[str]) -> None:
    known = list(manager.all_tasks)
    for task in tasks:
        if task in known:
            continue
        near = difflib.get_close_matches(task, known, _SHOWN_UNKNOWN)
        hint = f"; near it: {comma_list(near)}" if near else ""
        raise UserError(f"the task {task!r} is not known to lm-eval, nor in a folder of --include{hint}")


def _evaluate(
    model: ServedModel,
    task: str,
    budget: float | None,
    options: TaskOptions,
    *,
    manager: Any,
    note: Callable[[str], None],
) -> list[TaskScore]:
    import lm_eval
    import yaml

    from anyexperts_jax.harness.lm import HarnessLM

    note(f"{task} at {'its own budget' if budget is None else f'budget {budget:g}'}")
    lm = HarnessLM(model, budget, rows=options.rows, length=options.length)
    began = time.perf_counter()
    try:
        found = lm_eval.simple_evaluate(
            lm,
            tasks=[task],
            num_fewshot=options.fewshot,
            limit=options.limit,
            log_samples=False,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
            task_manager=manager,
            bootstrap_iters=1000,
        )
    except (OSError, yaml.YAMLError) as error:  # the task's files are broken, or its data cannot be fetched
        raise UserError(f"the task {task!r} cannot be read: {one_line(error, 300)}") from error
    seconds = time.perf_counter() - began
    assert found is not None
    used = lm.used.by_layer
    return [
        TaskScore(
            name,
            metric,
            score,
            error,
            better,
            examples=_count_examples(found, name),
            budget=budget,
            realised=sum(used) / len(used) if used else float("nan"),
            by_layer=used,
            policy=policy_name(model.base, budget),
            seconds=seconds,
        )
        for name, metric, score, error, better in _metrics(found)
    ]


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float, bool | None]]:
    """Yields (task, metric, score, standard error, whether higher is better) from lm-eval's results."""
    for name, values in {**found["results"], **found.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            error = float(error) if isinstance(error, int | float) else float("nan")
            shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
            yield name, shown, float(value), error, found["higher_is_better"].get(name, {}).get(metric)


def _count_examples(found: Mapping[str, Any], name: str) -> int:
    counts = found.get("n-samples", {})
    if name in counts:
        return int(counts[name]["effective"])
    subtasks = found.get("group_subtasks", {}).get(name, [])
    return sum(int(counts[one]["effective"]) for one in subtasks if one in counts)

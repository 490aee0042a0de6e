"""`evaluate_tasks`: runs lm-eval's `simple_evaluate` on a model of this package, for each task and budget."""

import contextlib
import dataclasses
import difflib
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anyexperts_jax.core.errors import UserError, comma_list, one_line, require
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.harness.scores import TaskScore, scores_of
from anyexperts_jax.serve.model import ServedModel
from anyexperts_jax.serve.slots import row_budget

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
    require_tasks_and_budgets(model, tasks, budgets)
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = manager_of("lm-eval", TaskManager, options.include, tasks)
        prepare = functools.partial(_prepare, model, options, manager)
        return score_each(model, tasks, budgets, prepare, note)


def require_harness() -> None:
    """Checks that the extra `harness` is installed.

    Raises:
      UserError: that says how to install it.
    """
    require_package("lm_eval", "harness", "--tasks needs")


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


def require_tasks_and_budgets(model: ServedModel, tasks: Sequence[str], budgets: Sequence[float | None]) -> None:
    """Checks what is asked for, before a harness is started.

    Raises:
      UserError: if no task is named, or the model cannot reach a budget.
    """
    require(len(tasks) > 0, "--tasks names no task")
    for budget in budgets:
        row_budget(model.base, model.weights.config, budget)


def manager_of(harness: str, make: Callable[..., Any], include: Sequence[pathlib.Path], tasks: Sequence[str]) -> Any:
    """Returns a harness's index of tasks. If the user's folders hold all tasks, its own large index is not built.

    Args:
      make: the harness's class of the index.

    Raises:
      UserError: if a folder is none, or a task is not known.
    """
    folders = folders_of(include) or None
    if folders:
        own = make(include_path=folders, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = make(include_path=folders)
    require_tasks(harness, list(manager.all_tasks), tasks)
    return manager


def score_each(
    model: ServedModel,
    tasks: Sequence[str],
    budgets: Sequence[float | None],
    prepare: Callable[[str, float | None], tuple[Any, Callable[[], Any]]],
    note: Callable[[str], None],
) -> list[TaskScore]:
    """Scores every task at every budget.

    Args:
      prepare: makes a harness's model of a task and a budget, which counts experts in `used`, and the call that runs
        the task with it.
      note: called with one line as each task begins.
    """
    scores = []
    for task in tasks:
        for budget in budgets:
            note(f"{task} at {'its own budget' if budget is None else f'budget {budget:g}'}")
            lm, run = prepare(task, budget)
            began = time.perf_counter()
            found = run()
            seconds = time.perf_counter() - began
            assert found is not None
            scores += scores_of(found, lm.used, model.base, budget, seconds)
    return scores


def folders_of(include: Sequence[pathlib.Path]) -> list[str]:
    """Returns the folders with the user's own tasks.

    Raises:
      UserError: if one is no folder.
    """
    for folder in include:
        require(folder.is_dir(), f"--include {folder} is no folder")
    return [str(folder) for folder in include]


def require_tasks(harness: str, known: Sequence[str], tasks: Sequence[str]) -> None:
    """Checks that a harness knows the tasks.

    Raises:
      UserError: naming the first that it does not know, and similar ones that it does.
    """
    for task in tasks:
        if task in known:
            continue
        near = difflib.get_close_matches(task, known, _SHOWN_UNKNOWN)
        hint = f"; near it: {comma_list(near)}" if near else ""
        raise UserError(f"the task {task!r} is not known to {harness}, nor in a folder of --include{hint}")


def _prepare(
    model: ServedModel, options: TaskOptions, manager: Any, task: str, budget: float | None
) -> tuple[Any, Callable[[], Any]]:
    import lm_eval
    import yaml

    from anyexperts_jax.harness.lm import HarnessLM

    lm = HarnessLM(model, budget, rows=options.rows, length=options.length)

    def run() -> Any:
        try:
            return lm_eval.simple_evaluate(
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

    return lm, run

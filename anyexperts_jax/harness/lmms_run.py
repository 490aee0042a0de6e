"""`evaluate_media_tasks`: runs lmms-eval's `simple_evaluate` on a model of this package, for each task and budget."""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.harness.run import TaskOptions, folders_of, require_tasks
from anyexperts_jax.harness.scores import TaskScore, scores_of
from anyexperts_jax.serve.model import ServedModel
from anyexperts_jax.serve.slots import row_budget

MAKE = "make lmms-env"  # makes an environment that has lmms-eval
_LIKELIHOODS = ("loglikelihood", "multiple_choice")


def evaluate_media_tasks(
    model: ServedModel,
    tasks: Sequence[str],
    budgets: Sequence[float | None] = (None,),
    options: TaskOptions | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[TaskScore]:
    """Scores a model that sees or hears on lmms-eval's tasks, or on the user's own in its format.

    Args:
      tasks: names of tasks or groups.
      budgets: real experts per token; None: the model's own window.
      options: `chat` is not used: prompts are conversations anyway.
      note: called with one line as each task begins.

    Raises:
      UserError: if lmms-eval is not installed, the model reads text alone, a task is unknown or cannot be read, or the
        model cannot reach a budget.
    """
    require_lmms()
    from loguru import logger

    from anyexperts_jax.harness.lmms import require_media

    options = options or TaskOptions()
    require_media(model)
    require(len(tasks) > 0, "--tasks names no task")
    for budget in budgets:
        row_budget(model.base, model.weights.config, budget)
    logger.disable("lmms_eval")
    try:
        manager = _task_manager(options, tasks)
        return [
            score
            for task in tasks
            for budget in budgets
            for score in _evaluate(model, task, budget, options, manager=manager, note=note)
        ]
    finally:
        logger.enable("lmms_eval")


def require_lmms() -> None:
    """Checks that lmms-eval is installed.

    Raises:
      UserError: that says how to install it.
    """
    installed = importlib.util.find_spec("lmms_eval") is not None
    require(installed, f"--harness lmms-eval needs the package lmms_eval in an environment of its own: {MAKE}")


def _task_manager(options: TaskOptions, tasks: Sequence[str]) -> Any:
    """Returns lmms-eval's index of tasks. If the user's folders hold all tasks, its own large index is not built."""
    from lmms_eval.tasks import TaskManager

    from anyexperts_jax.harness.lmms_plugin import MODEL_ID

    folders = folders_of(options.include) or None
    if folders:
        own = TaskManager("ERROR", include_path=folders, include_defaults=False, model_name=MODEL_ID)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager("ERROR", include_path=folders, model_name=MODEL_ID)
    require_tasks("lmms-eval", list(manager.all_tasks), tasks)
    return manager


def _evaluate(
    model: ServedModel,
    task: str,
    budget: float | None,
    options: TaskOptions,
    *,
    manager: Any,
    note: Callable[[str], None],
) -> list[TaskScore]:
    from lmms_eval.evaluator import simple_evaluate

    from anyexperts_jax.harness.lmms import HarnessLMM, SimpleHarnessLMM

    note(f"{task} at {'its own budget' if budget is None else f'budget {budget:g}'}")
    with _readable(task):
        simple = _asks_for_likelihoods(task, manager)
    kind = SimpleHarnessLMM if simple else HarnessLMM
    lm = kind(model, budget, rows=options.rows, length=options.length)
    began = time.perf_counter()
    with _readable(task):
        found = simple_evaluate(
            lm,
            tasks=[task],
            num_fewshot=options.fewshot,
            limit=options.limit,
            log_samples=False,
            task_manager=manager,
            bootstrap_iters=1000,
            process_docs_parallel=1,
        )
    seconds = time.perf_counter() - began
    assert found is not None
    return scores_of(found, lm.used, model.base, budget, seconds)


def _asks_for_likelihoods(task: str, manager: Any) -> bool:
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict

    kinds = {one.task.OUTPUT_TYPE for one in get_task_list(get_task_dict([task], manager, "simple"))}
    several = f"the group {task!r} has tasks of likelihoods and tasks of answers; name its tasks one by one"
    require(len({kind in _LIKELIHOODS for kind in kinds}) == 1, several)
    return kinds <= set(_LIKELIHOODS)


@contextlib.contextmanager
def _readable(task: str) -> Iterator[None]:
    """Turns the errors of a task's broken files, and of data that cannot be fetched, into one line."""
    import tenacity
    import yaml

    try:
        yield
    except tenacity.RetryError as error:  # lmms-eval tries several times to fetch data, and to score an answer
        cause = error.last_attempt.exception() or error
        raise UserError(f"the task {task!r} cannot be run: {one_line(cause, 300)}") from error
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"the task {task!r} cannot be read: {one_line(error, 300)}") from error

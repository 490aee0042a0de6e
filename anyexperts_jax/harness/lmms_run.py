"""`evaluate_media_tasks`: runs lmms-eval's `simple_evaluate` on a model of this package, for each task and budget."""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.harness.run import TaskOptions, manager_of, require_tasks_and_budgets, score_each
from anyexperts_jax.harness.scores import TaskScore
from anyexperts_jax.serve.model import ServedModel

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
    from anyexperts_jax.harness.lmms_plugin import MODEL_ID

    options = options or TaskOptions()
    require_media(model)
    require_tasks_and_budgets(model, tasks, budgets)
    logger.disable("lmms_eval")
    try:
        from lmms_eval.tasks import TaskManager

        make = functools.partial(TaskManager, "ERROR", model_name=MODEL_ID)
        manager = manager_of("lmms-eval", make, options.include, tasks)
        prepare = functools.partial(_prepare, model, options, manager)
        return score_each(model, tasks, budgets, prepare, note)
    finally:
        logger.enable("lmms_eval")


def require_lmms() -> None:
    """Checks that lmms-eval is installed.

    Raises:
      UserError: that says how to install it.
    """
    installed = importlib.util.find_spec("lmms_eval") is not None
    require(installed, f"--harness lmms-eval needs the package lmms_eval in an environment of its own: {MAKE}")


def _prepare(
    model: ServedModel, options: TaskOptions, manager: Any, task: str, budget: float | None
) -> tuple[Any, Callable[[], Any]]:
    from lmms_eval.evaluator import simple_evaluate

    from anyexperts_jax.harness.lmms import HarnessLMM, SimpleHarnessLMM

    with _readable(task):
        simple = _asks_for_likelihoods(task, manager)
    kind = SimpleHarnessLMM if simple else HarnessLMM
    lm = kind(model, budget, rows=options.rows, length=options.length)

    def run() -> Any:
        with _readable(task):
            return simple_evaluate(
                lm,
                tasks=[task],
                num_fewshot=options.fewshot,
                limit=options.limit,
                log_samples=False,
                task_manager=manager,
                bootstrap_iters=1000,
                process_docs_parallel=1,
            )

    return lm, run


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

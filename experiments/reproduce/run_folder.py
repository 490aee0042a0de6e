"""A run's folder, RUNS/ID: run.json, log.txt, result.json once done, and train/ while it runs or if it is kept."""

import pathlib

from anyexperts_jax.core.errors import UserError, require_one_of
from anyexperts_jax.train.run_dir import write_whole
from experiments.reproduce.experiment import Run, run_to_json
from experiments.reproduce.recipes import RECIPES, Note, drop_checkpoint, has_checkpoint, recipe
from experiments.reproduce.run_result import RESULT_NAME, RunResult, load_result, save_result

RUN_NAME = "run.json"
LOG_NAME = "log.txt"


def prepare(run: Run, root: pathlib.Path) -> pathlib.Path:
    """Makes the run's folder and writes run.json.

    Raises:
      UserError: for an unknown recipe, or a folder that cannot be made.
    """
    require_one_of("recipe", run.recipe, RECIPES)
    folder = root / run.id
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RUN_NAME, run_to_json(run))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return folder


def finished(run: Run, root: pathlib.Path) -> RunResult | None:
    """Returns the run's result; None if it is not done or lacks a checkpoint it should keep."""
    path = root / run.id / RESULT_NAME
    if not path.exists() or (run.keep and not has_checkpoint(path.parent)):
        return None
    return load_result(path)


def finish(run: Run, folder: pathlib.Path, note: Note) -> RunResult:
    """Makes or resumes the run and writes result.json; drops the checkpoint unless it is kept."""
    result = recipe(run.recipe)(run, folder, note)
    save_result(result, folder)
    if not run.keep:
        drop_checkpoint(folder)
    return result

"""How a run is made, by name: an experiment's `recipe`."""

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping

from anyexperts_jax.analysis.evaluate import Options, evaluate_trained
from anyexperts_jax.analysis.trained import load_trained
from anyexperts_jax.core.errors import require_one_of
from anyexperts_jax.reproduce.experiment import Run
from anyexperts_jax.reproduce.run_result import RunResult
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.run_dir import write_whole

TRAIN_FOLDER = "train"
_SECONDS_NAME = "seconds.json"  # of training so far, beside the checkpoints

Note = Callable[[str], None]
Recipe = Callable[[Run, pathlib.Path, Note], RunResult]


def train_and_evaluate(run: Run, folder: pathlib.Path, note: Note) -> RunResult:
    """Trains in `folder`/train, going on from a checkpoint there, and evaluates the last state at every budget.

    The last state and not the best: which step validates best would be one more choice that differs between variants.
    """
    train_folder = folder / TRAIN_FOLDER
    start = time.perf_counter()
    before = _seconds(folder)
    try:
        trained = train(run.config, train_folder)
    finally:
        train_seconds = before + time.perf_counter() - start
        write_whole(folder / _SECONDS_NAME, json.dumps({"train": train_seconds}) + "\n")
    domains = trained.validation["domains"]
    validation = {name: scores["exact_match"] for name, scores in domains.items()}
    note(f"trained in {train_seconds:.0f} s: " + "  ".join(f"{name} {right:.0%}" for name, right in validation.items()))
    start = time.perf_counter()
    amounts = run.evaluation
    options = Options(
        num_examples=amounts.test_examples,
        calibration_examples=amounts.validation_examples,
        time_rounds=1,
        calibrated=False,
        model_baselines=amounts.model_baselines,
    )
    evaluation = evaluate_trained(load_trained(train_folder, "last"), run.budgets, options=options, note=note)
    return RunResult.of(
        evaluation,
        id=run.id,
        name=run.name,
        seed=run.config.seed,
        trained_budget=run.config.model.moe.expected_real_slots,
        validation=validation,
        train_seconds=train_seconds,
        evaluate_seconds=time.perf_counter() - start,
    )


RECIPES: Mapping[str, Recipe] = {"train_and_evaluate": train_and_evaluate}


def recipe(name: str) -> Recipe:
    """Raises:
    UserError: for an unknown name.
    """
    require_one_of("recipe", name, RECIPES)
    return RECIPES[name]


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Whether the run in `folder` still has what its pictures are made from."""
    return any((folder / TRAIN_FOLDER / "checkpoints").glob("[0-9]*"))


def drop_checkpoint(folder: pathlib.Path) -> None:
    """Removes what was only needed to go on, or to measure."""
    shutil.rmtree(folder / TRAIN_FOLDER, ignore_errors=True)
    (folder / _SECONDS_NAME).unlink(missing_ok=True)


def _seconds(folder: pathlib.Path) -> float:
    path = folder / _SECONDS_NAME
    return float(json.loads(path.read_text())["train"]) if path.exists() else 0.0

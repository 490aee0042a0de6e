"""The recipes by name: how an experiment's runs are made."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from anyexperts_jax.core.errors import require_one_of
from anyexperts_jax.evaluate.evaluate import Options, evaluate_trained
from anyexperts_jax.evaluate.trained import Trained, load_trained
from anyexperts_jax.evolution.stages import evolve
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.run_dir import write_whole
from experiments.reproduce.evolved import expert_figures, last_model, validation_record
from experiments.reproduce.experiment import EVOLVES, Run
from experiments.reproduce.run_result import RunResult
from experiments.reproduce.shared_stages import SHARED, link_stages, trained_start

TRAIN_FOLDER = "train"
_SECONDS_NAME = "seconds.json"  # seconds of training so far, stored next to the checkpoints

Note = Callable[[str], None]
Recipe = Callable[[Run, pathlib.Path, Note], RunResult]


def train_and_evaluate(run: Run, folder: pathlib.Path, note: Note) -> RunResult:
    """Trains in `folder`/train, resuming from a checkpoint there, and evaluates the last state at every budget.

    It takes the last state, not the best: the step that validates best would be one more choice that differs between
    variants.
    """
    train_folder, config, origin = folder / TRAIN_FOLDER, run.config, None
    if run.start is not None:
        start = trained_start(run.start, folder.parent, note)
        origin = _origin(start.name, start)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, start_from=str(start.absolute())))
    with _timed(folder) as seconds:
        record = train(config, train_folder).validation
    result = _measured(run, load_trained(train_folder, "last"), record, seconds(), note)
    return dataclasses.replace(result, origin=origin)


def evolve_and_evaluate(run: Run, folder: pathlib.Path, note: Note) -> RunResult:
    """Trains EvoMoE's stages in `folder`/train, I and II shared with other runs, and evaluates the final model.

    After stage I that is the dense model, after II expert 1 in place of all, after III the mixture.
    """
    stages, train_folder = run.evolve_run, folder / TRAIN_FOLDER
    last = stages.stages[-1]
    with _timed(folder) as seconds:
        link_stages(stages, train_folder, folder.parent, note)
        if last not in SHARED:
            evolve(stages, train_folder, (last,), note=note)
    trained, record = last_model(stages, train_folder), validation_record(train_folder / last)
    first = (train_folder / stages.stages[0]).resolve()
    result = _measured(run, trained, record, seconds(), note)
    result = dataclasses.replace(result, origin=_origin(first.parent.name, first))
    if last in SHARED or run.moe.num_experts == 1:
        return result
    amount = run.evaluation.validation_examples
    return dataclasses.replace(result, experts=expert_figures(stages, train_folder, trained, amount))


def _origin(name: str, folder: pathlib.Path) -> str:
    """Returns a shared training's name with a digest of its exact scores, which no second training repeats."""
    record = validation_record(folder)
    scored = json.dumps([record["loss"], record["domains"]], sort_keys=True)
    return f"{name}:{hashlib.sha256(scored.encode()).hexdigest()[:12]}"


def _measured(run: Run, trained: Trained, record: dict[str, Any], train_seconds: float, note: Note) -> RunResult:
    """Returns the result of `trained` at every budget of the run; `record` is its validation record."""
    validation = {name: scores["exact_match"] for name, scores in record["domains"].items()}
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
    moe = trained.config.model.moe
    own = moe.expected_real_slots
    budgets = run.budgets if moe == run.moe else (own,)  # stages I and II end with a dense model, which has one
    return RunResult.of(
        evaluate_trained(trained, budgets, options=options, note=note),
        id=run.id,
        name=run.name,
        seed=run.config.seed,
        trained_budget=own,
        validation=validation,
        train_seconds=train_seconds,
        evaluate_seconds=time.perf_counter() - start,
    )


@contextlib.contextmanager
def _timed(folder: pathlib.Path) -> Iterator[Callable[[], float]]:
    """Counts the seconds spent inside, plus those of earlier attempts, even after an error."""
    path = folder / _SECONDS_NAME
    before = float(json.loads(path.read_text())["train"]) if path.exists() else 0.0
    start = time.perf_counter()
    seconds = before

    def so_far() -> float:
        return seconds

    try:
        yield so_far
    finally:
        seconds = before + time.perf_counter() - start
        write_whole(path, json.dumps({"train": seconds}) + "\n")


RECIPES: Mapping[str, Recipe] = {"train_and_evaluate": train_and_evaluate, EVOLVES: evolve_and_evaluate}


def recipe(name: str) -> Recipe:
    """Raises:
    UserError: for an unknown name.
    """
    require_one_of("recipe", name, RECIPES)
    return RECIPES[name]


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Returns whether the run in `folder` still has the checkpoint for its pictures."""
    return any((folder / TRAIN_FOLDER / "checkpoints").glob("[0-9]*"))


def drop_checkpoint(folder: pathlib.Path) -> None:
    """Removes the files that were only needed to resume or to measure."""
    shutil.rmtree(folder / TRAIN_FOLDER, ignore_errors=True)
    (folder / _SECONDS_NAME).unlink(missing_ok=True)

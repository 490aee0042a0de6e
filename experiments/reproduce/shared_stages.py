"""Trains stages that several runs share once, under a lock, in RUNS/stages: EvoMoE's stages I and II, or a start.

An evolving run's folder links to its shared stages; the run trains stage III itself. The first run that needs a stage
trains it; a stopped stage is resumed by the next run that needs it.
"""

import contextlib
import fcntl
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evolution.config import EvolveConfig, EvolveRun, StageConfig
from anyexperts_jax.evolution.stages import evolve, stage_done
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.run_dir import RunDir
from experiments.reproduce.experiment import Run, config_digest, evolve_digest

STORE_NAME = "stages"  # in the same folder as the runs' folders
SHARED = ("warm_up", "evolving")
_OF_EVOLUTION = ("upcycle", "evolution", "evolving", "evolve_in_warm_up")
_NO_STEPS = StageConfig(steps=0)

Note = Callable[[str], None]


def up_to(run: EvolveRun, name: str) -> EvolveRun:
    """Returns the run that ends with stage `name`, without settings that do not affect it, so sharing runs agree."""
    needed: dict[str, Any] = {"warm_up": run.evolve.warm_up, "evolving": _NO_STEPS, "routing": _NO_STEPS}
    if name == "evolving" or run.evolve.evolve_in_warm_up:
        needed |= {part: getattr(run.evolve, part) for part in _OF_EVOLUTION}
        needed["moe"] = AnyExpertsConfig.static_top_k(run.evolve.upcycle.num_experts, 1)
    return EvolveRun(run.base, EvolveConfig(**needed))


def missing_stages(run: Run, root: pathlib.Path) -> frozenset[str]:
    """Returns the folder names of the shared stages that `run` would have to train first."""
    missing = set()
    if run.start is not None and not _is_trained(run.start, place := _start_place(run.start, root)):
        missing.add(place.name)
    if run.evolve is None:
        return frozenset(missing)
    stages = run.evolve_run
    needed = [name for name in stages.stages if name in SHARED and not _is_done(stages, name, root)]
    return frozenset(missing | {_place(stages, name, root).name for name in needed})


def trained_start(start: RunConfig, root: pathlib.Path, note: Note) -> pathlib.Path:
    """Returns the folder of the run `start`, which is first trained to its end if needed.

    Raises:
      RunStoppedError: as for `train.loop.train`.
    """
    place = _start_place(start, root)
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place.with_suffix(".lock")):
        if not _is_trained(start, place):
            note(f"training the start: {start.train.steps} steps in {place}")
            train(start, place)
    return place


def _start_place(start: RunConfig, root: pathlib.Path) -> pathlib.Path:
    return root / STORE_NAME / f"start_{config_digest(start)}"


def _is_trained(config: RunConfig, folder: pathlib.Path) -> bool:
    return RunDir(folder).checkpoint_steps()[-1:] == [config.train.steps]


def link_stages(run: EvolveRun, folder: pathlib.Path, root: pathlib.Path, note: Note) -> None:
    """Trains the missing shared stages of `run` and links all of them into `folder`.

    Raises:
      UserError: if another file is in the way.
      RunStoppedError: as for `train.loop.train`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (name for name in run.stages if name in SHARED):
        place = _place(run, name, root)
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place.with_suffix(".lock")):
            if not _is_done(run, name, root):
                if name == "evolving":
                    _link(place / "warm_up", _place(run, "warm_up", root) / "warm_up")
                evolve(up_to(run, name), place, (name,), note=note)
        _link(folder / name, place / name)


def _place(run: EvolveRun, name: str, root: pathlib.Path) -> pathlib.Path:
    return root / STORE_NAME / _stage_name(run, name)


@functools.lru_cache(maxsize=4096)
def _stage_name(run: EvolveRun, name: str) -> str:
    return f"{name}_{evolve_digest(up_to(run, name))}"


def _is_done(run: EvolveRun, name: str, root: pathlib.Path) -> bool:
    return stage_done(run, _place(run, name, root), name)


def _link(link: pathlib.Path, target: pathlib.Path) -> None:
    if link.is_symlink():
        link.unlink()
    try:
        link.symlink_to(target.absolute(), target_is_directory=True)
    except OSError as error:
        raise UserError(f"cannot link {link} to {target}: {error.strerror}") from error


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Admits one process at a time; the lock of a dead process is free."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

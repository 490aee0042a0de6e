"""What many runs have in common, trained once, in RUNS/stages, under a lock: EvoMoE's stages I and II, or a start.

An evolving run's folder links to its stages; what is its own, stage III, it trains itself. Who comes first trains; a
stage that was stopped goes on with whoever needs it next.
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

STORE_NAME = "stages"  # beside the runs' folders
SHARED = ("warm_up", "evolving")
_OF_EVOLUTION = ("upcycle", "evolution", "evolving", "evolve_in_warm_up")
_NO_STEPS = StageConfig(steps=0)

Note = Callable[[str], None]


def up_to(run: EvolveRun, name: str) -> EvolveRun:
    """The run that ends with stage `name`, without what does not matter to it: runs that share the stage have one."""
    needed: dict[str, Any] = {"warm_up": run.evolve.warm_up, "evolving": _NO_STEPS, "routing": _NO_STEPS}
    if name == "evolving" or run.evolve.evolve_in_warm_up:
        needed |= {part: getattr(run.evolve, part) for part in _OF_EVOLUTION}
        needed["moe"] = AnyExpertsConfig.static_top_k(run.evolve.upcycle.num_experts, 1)
    return EvolveRun(run.base, EvolveConfig(**needed))


def missing_stages(run: Run, root: pathlib.Path) -> frozenset[str]:
    """The shared stages that `run` would train first, by their folders' names."""
    missing = set()
    if run.start is not None and not _is_trained(run.start, place := _start_place(run.start, root)):
        missing.add(place.name)
    if run.evolve is None:
        return frozenset(missing)
    stages = run.evolve_run
    needed = [name for name in stages.stages if name in SHARED and not _is_done(stages, name, root)]
    return frozenset(missing | {_place(stages, name, root).name for name in needed})


def trained_start(start: RunConfig, root: pathlib.Path, note: Note) -> pathlib.Path:
    """The folder of the run `start`, which is trained to its end first if it is not there yet.

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
    """Trains what shared stages of `run` are not there yet, and links them into `folder`.

    Raises:
      UserError: when something else is in the way.
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
    """One process at a time; the lock of one that died is free."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

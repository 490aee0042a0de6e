"""A run's directory: configuration, log, TensorBoard files, checkpoints, profiles, evaluation and report."""

import contextlib
import dataclasses
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from anyexperts_jax.core.errors import UserError, require, require_one_of
from anyexperts_jax.core.files import require_local
from anyexperts_jax.models.init import abstract_params, logical_axes
from anyexperts_jax.sharding.specs import param_shardings, replicated
from anyexperts_jax.train.config import RunConfig, load_config, to_json
from anyexperts_jax.train.run_tokenizer import keep_tokenizer, with_kept_tokenizer
from anyexperts_jax.train.same_run import require_same_run

WHICH = ("best", "last")
TRAIN_LOCK = "train.lock"  # held while a process trains in the directory: see train.run_lock
_STEP = re.compile(r"0|[1-9][0-9]*")


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The paths of a run.

    Raises:
      UserError: if `root` is the address of an object store.
    """

    root: pathlib.Path

    def __post_init__(self) -> None:
        require_local(self.root, "run directory")

    @property
    def config(self) -> pathlib.Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.root / "checkpoints"

    @property
    def tokenizer(self) -> pathlib.Path:
        """The copy of the run's tokenizer; runs on bytes have none."""
        return self.root / "tokenizer"

    @property
    def base(self) -> pathlib.Path:
        """The files, without weights, of the published checkpoint that the run started from; other runs have none."""
        return self.root / "base"

    @property
    def profile(self) -> pathlib.Path:
        """The folder of profiler traces."""
        return self.root / "profile"

    @property
    def profile_request(self) -> pathlib.Path:
        """A file that requests a trace from a running process, which deletes it when the trace starts."""
        return self.root / "profile.request"

    def checkpoint_steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return steps_in(self.checkpoints)


def steps_in(directory: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a directory, in order. Entries with other names are ignored."""
    names = os.listdir(directory) if directory.is_dir() else []
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def require_run_of(paths: RunDir, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Checks that the run in the directory, if any, has this configuration; returns the allowed differences.

    A run without a checkpoint cannot be resumed, so its configuration may be replaced by any other.

    Raises:
      UserError: naming the keys that differ.
    """
    if not (paths.config.exists() and paths.checkpoint_steps()):
        return {}
    return require_same_run(config, load_config(paths.config), f"the run in {paths.root}")


def open_run_dir(
    root: str | pathlib.Path, config: RunConfig, *, writes: bool = True
) -> tuple[RunDir, dict[str, tuple[Any, Any]]]:
    """Creates the directory of a run, or checks that an existing one is of the same run; writes config.json.

    Returns the paths and the allowed differences from the existing configuration.

    Args:
      writes: False checks only, for processes other than the one that writes.

    Raises:
      UserError: if it cannot be created or written to, or has a run of another configuration (naming the keys).
    """
    paths = RunDir(pathlib.Path(root))
    changed = require_run_of(paths, config)
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run directory {paths.root}: {error.strerror}") from error
    if writes:
        try:
            keep_tokenizer(config.data, paths.tokenizer)
            write_whole(paths.config, to_json(config))
        except OSError as error:
            raise UserError(f"cannot write to the run directory {paths.root}: {error.strerror}") from error
    return paths, changed


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically: readers see either the old file or the new one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedRun:
    """A loaded checkpoint of a run: configuration, parameters and expert biases [L, C]."""

    config: RunConfig
    params: Any
    router_bias_LC: jax.Array
    step: int


def load_run(
    run_dir: str | pathlib.Path, which: str = "best", mesh: Mesh | None = None
) -> tuple[RunConfig, Any, jax.Array]:
    """Configuration, parameters and expert biases [L, C] of a run's best or last checkpoint; see `load_checkpoint`."""
    found = load_checkpoint(run_dir, which, mesh)
    return found.config, found.params, found.router_bias_LC


def load_checkpoint(run_dir: str | pathlib.Path, which: str = "best", mesh: Mesh | None = None) -> LoadedRun:
    """Loads a run's best or last checkpoint, also while the run is training. Its tokenizer is the copy in the run.

    The arrays are put on `mesh`, or else on the first device, whatever mesh they were trained on.

    Raises:
      UserError: if there is no run or no checkpoint, if it is damaged, or if any validation loss is unreadable.
    """
    from anyexperts_jax.train.checkpoint import Checkpoints

    require_one_of("which", which, WHICH)
    paths = RunDir(pathlib.Path(run_dir))
    require(paths.checkpoints.is_dir(), f"no run in {paths.root}: there is no {paths.checkpoints}")
    with contextlib.closing(Checkpoints(paths.checkpoints, read_only=True)) as checkpoints:
        step = checkpoints.best if which == "best" else checkpoints.latest
        if step is None:
            raise UserError(f"no checkpoint in {paths.checkpoints}; the run stopped before it wrote one")
        config = checkpoints.config(step)
        config = dataclasses.replace(config, data=with_kept_tokenizer(config.data, paths.tokenizer))
        params, router_bias_LC = checkpoints.restore_model(step, *_abstract_model(config, mesh))
        return LoadedRun(config, params, router_bias_LC, step)


def _abstract_model(config: RunConfig, mesh: Mesh | None) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of the parameters and the expert biases."""
    model = config.model
    params = abstract_params(model)
    if mesh is None:
        everywhere: Any = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: everywhere, params)
    else:
        everywhere = replicated(mesh)
        shardings = param_shardings(mesh, logical_axes(model), params)
    place = lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)  # noqa: E731
    bias_LC = jax.ShapeDtypeStruct(model.router_bias_shape, jnp.float32)
    return jax.tree.map(place, params, shardings), place(bias_LC, everywhere)

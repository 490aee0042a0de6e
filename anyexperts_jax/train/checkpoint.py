"""Checkpoints of a run: written in the background, whole or not at all, restored onto any mesh."""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.train.config import FREE_KEYS, RunConfig, describe_differences, from_json
from anyexperts_jax.train.state import TrainState
from anyexperts_jax.train.strict import differing_keys

# What Orbax and TensorStore raise on files that are missing, cut short or not theirs.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)

SMALL_FILES_BYTES = 1 << 20  # metadata, configuration and data state of a checkpoint, amply
LEAST_PART_BYTES = 1 << 20  # of an array that devices have copies of, which they write in parts: a program a part


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's log off the terminal: what goes wrong in its threads is raised here as well, and said once."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


class Checkpoints:
    """The checkpoints under `directory`, by step. Keeps the last few and the one with the lowest validation loss.

    A checkpoint holds the parameters, the expert biases, the optimiser's state, the data iterator's state and the
    run's configuration, each readable without the others. It appears under its name only once it is whole.
    """

    def __init__(self, directory: pathlib.Path, keep_last: int = 1, *, read_only: bool = False) -> None:
        """Opens the directory; to write, it is made, and what a killed run left half written there goes.

        Raises:
          UserError: when the validation loss of a checkpoint in it is unreadable.
        """
        self.directory = directory
        _require_readable_metrics(directory)
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_last),
                checkpoint_managers.BestN(get_metric_fn=_validation_loss, reverse=True, n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_validation_loss,
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, handler_registry=_handlers())

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss; the latest if none was evaluated."""
        return self._manager.best_step()

    def save(
        self,
        state: TrainState,
        data_state: dict[str, Any],
        config: RunConfig,
        validation_loss: float = math.inf,
    ) -> None:
        """Starts writing the state; returns once it is copied and may be overwritten. Waits for the one before.

        Raises:
          OSError: when there is no room for it.
          Exception: what went wrong with the one before.
        """
        self._manager.check_for_errors()
        self._require_room(state)
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(state.params),
                router_bias=ocp.args.PyTreeSave({"router_bias_LC": state.router_bias_LC}),
                optimizer=ocp.args.PyTreeSave({"step": state.step, "opt_state": state.opt_state}),
                data=ocp.args.JsonSave(data_state),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            ),
            metrics={"validation_loss": validation_loss},
            force=True,
        )

    def restore(self, step: int, abstract: TrainState, config: RunConfig) -> tuple[TrainState, dict[str, Any]]:
        """The state, on the shardings of `abstract`, and the data iterator's state.

        Raises:
          UserError: when the checkpoint is unreadable, or of another configuration (naming the keys).
        """
        require_same_run(config, self.config(step), f"checkpoint {step} in {self.directory}")
        saved = self._read(
            step,
            params=_into(abstract.params),
            router_bias=_into({"router_bias_LC": abstract.router_bias_LC}),
            optimizer=_into({"step": abstract.step, "opt_state": abstract.opt_state}),
            data=ocp.args.JsonRestore(),
        )
        state = TrainState(params=saved.params, **saved.optimizer, **saved.router_bias)
        return state, saved.data

    def restore_model(self, step: int, params: Any, router_bias_LC: Any) -> tuple[Any, jax.Array]:
        """The parameters and expert biases alone, into abstract arrays that say where they go.

        Raises:
          UserError: when the checkpoint is unreadable.
        """
        saved = self._read(step, params=_into(params), router_bias=_into({"router_bias_LC": router_bias_LC}))
        return saved.params, saved.router_bias["router_bias_LC"]

    def config(self, step: int) -> RunConfig:
        """The configuration of the run that wrote the checkpoint.

        Raises:
          UserError: when it is unreadable or not a configuration of this version.
        """
        saved = self._read(step, config=ocp.args.JsonRestore())
        return from_json(json.dumps(saved.config), f"checkpoint {step} in {self.directory}")

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          Exception: what went wrong with it.
        """
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()

    def _require_room(self, state: TrainState) -> None:
        """Asks before the writing starts: found out half way, a full disk fills the terminal with tracebacks."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SMALL_FILES_BYTES
        if shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except _UNREADABLE as error:
            raise _unreadable(self.directory, step, self.steps, error) from error


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Orbax's own, but for arrays that devices have copies of: it would compile a slice for every part, however small,
    which on eight devices takes seconds of a run's first checkpoint."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_PART_BYTES)
    trees = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add(None, args, trees)  # whatever the item
    return registry


def _into(abstract: Any) -> ocp.args.PyTreeRestore:
    """Arrays of the shapes, dtypes and shardings of `abstract`."""
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def require_same_run(config: RunConfig, saved: RunConfig, where: str) -> dict[str, tuple[Any, Any]]:
    """Refuses to go on from a run of another configuration; returns what differs and may.

    Raises:
      UserError: naming the keys that differ, with both values.
    """
    differences = differing_keys(config, saved)
    free = {key: values for key, values in differences.items() if key.startswith(FREE_KEYS)}
    fixed = {key: values for key, values in differences.items() if key not in free}
    shown = dict(list(fixed.items())[:6])
    more = f" and {len(fixed) - len(shown)} more" if len(fixed) > len(shown) else ""
    require(not fixed, f"{where} is of another configuration: {describe_differences(shown)}{more}")
    return free


def _require_readable_metrics(directory: pathlib.Path) -> None:
    """Reads every checkpoint's validation loss before Orbax does, which does not say whose it could not read."""
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    for step in steps:
        try:
            float(_validation_loss(json.loads((directory / str(step) / "metrics" / "metrics").read_text())))
        except FileNotFoundError:
            continue  # Orbax takes it for one that was not evaluated
        except _UNREADABLE as error:
            raise _unreadable(directory, step, steps, error) from error


def _unreadable(directory: pathlib.Path, step: int, steps: list[int], error: Exception) -> UserError:
    others = [other for other in steps if other != step]
    rest = f"move {directory / str(step)} away to go on from step {others[-1]}" if others else "there is no other"
    line = " ".join(str(error).split())[:200]
    return UserError(f"checkpoint {step} in {directory} is unreadable ({line}); {rest}")


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]

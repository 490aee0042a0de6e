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
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.core.files import parse_json_object
from anyexperts_jax.train import processes
from anyexperts_jax.train.config import RunConfig, from_json
from anyexperts_jax.train.integrity import (
    CHECKSUMS_NAME,
    JSON_ITEMS,
    TREE_ITEMS,
    Damage,
    find_damage,
    find_undecodable_json,
    write_checksums,
)
from anyexperts_jax.train.path_alias import PathAlias
from anyexperts_jax.train.run_dir import TRAIN_LOCK, steps_in
from anyexperts_jax.train.same_run import require_same_run
from anyexperts_jax.train.state import TrainState

SMALL_FILES_BYTES = 1 << 20  # metadata, configuration and data state of a checkpoint, amply
LEAST_PART_BYTES = 1 << 20  # of an array that devices have copies of, which they write in parts: a program a part
SECOND_LOOK_SECONDS = 1.0  # until a file counts as damaged: a run under way may be removing the checkpoint


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
    run's configuration, each readable without the others, and checksums of their files. It appears under its name only
    once it is whole. What is read is compared with its checksums first; arrays must be finite.
    """

    def __init__(self, directory: pathlib.Path, keep_last: int = 1, *, read_only: bool = False) -> None:
        """Opens the directory; to write, it is made, and what a killed run left half written there goes.

        Raises:
          UserError: when something in it has a checkpoint's name and is none, or the validation loss of one is
            unreadable.
        """
        self.directory = directory
        self._read_only = read_only
        self._whole: set[tuple[int, str]] = set()  # step and item, once compared
        _require_checkpoints(directory)
        if not read_only:
            directory.mkdir(parents=True, exist_ok=True)
        self._alias = PathAlias(directory)
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
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(self._alias.path, options=options, handler_registry=_handlers())

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
          UserError: when the checkpoint is damaged, or of another configuration (naming the keys).
        """
        require_same_run(config, self.config(step), self._name(step))
        data_state = self._read_json(step, "data")
        saved = self._read(
            step,
            params=abstract.params,
            router_bias={"router_bias_LC": abstract.router_bias_LC},
            optimizer={"step": abstract.step, "opt_state": abstract.opt_state},
        )
        return TrainState(params=saved.params, **saved.optimizer, **saved.router_bias), data_state

    def restore_model(self, step: int, params: Any, router_bias_LC: Any) -> tuple[Any, jax.Array]:
        """The parameters and expert biases alone, into abstract arrays that say where they go.

        Raises:
          UserError: when the checkpoint is damaged.
        """
        saved = self._read(step, params=params, router_bias={"router_bias_LC": router_bias_LC})
        return saved.params, saved.router_bias["router_bias_LC"]

    def config(self, step: int) -> RunConfig:
        """The configuration of the run that wrote the checkpoint.

        Raises:
          UserError: when it is damaged or not a configuration of this version.
        """
        return from_json(json.dumps(self._read_json(step, "config")), self._name(step))

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          Exception: what went wrong with it.
        """
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        try:
            self._manager.close()
        finally:
            self._alias.close()

    def _name(self, step: int) -> str:
        return f"checkpoint {step} in {self.directory}"

    def _require_room(self, state: TrainState) -> None:
        """Asks before the writing starts: found out half way, a full disk fills the terminal with tracebacks."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SMALL_FILES_BYTES
        if shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))

    def _seal(self) -> None:
        """Writes the checksums. Orbax calls it in one process, with every file written, before the checkpoint has its
        name: one without checksums has none of them missing, it is older."""
        unnamed = [entry for entry in self._alias.path.iterdir() if ocp.utils.TMP_DIR_SUFFIX in entry.name]
        for folder in unnamed:
            write_checksums(folder)

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        self._require_whole(step, [item])
        path = self.directory / str(step) / item / "metadata"
        return parse_json_object(path.read_text(encoding="utf-8"), str(path))

    def _read(self, step: int, **trees: Any) -> Any:
        """The arrays of some items, of the shapes, dtypes and shardings of the abstract ones in `trees`."""
        self._require_whole(step, list(trees))
        args = {
            item: ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for item, tree in trees.items()
        }
        try:
            with quiet_orbax():
                saved = self._manager.restore(step, args=ocp.args.Composite(**args))
        except ValueError:
            self._require_arrays(step, trees)
            raise
        self._require_finite(step, {item: saved[item] for item in trees})
        return saved

    def _require_whole(self, step: int, items: list[str]) -> None:
        """Compares an item's files with their checksums, once; several processes share the work.

        Raises:
          UserError: a file is not what was written, or the run that is under way has removed the checkpoint.
        """
        left = [item for item in items if (step, item) not in self._whole]
        folder, error = self.directory / str(step), None
        try:
            damage = find_damage(folder, left, processes.share())
            if damage is not None and self._read_only and (self.directory.parent / TRAIN_LOCK).exists():
                time.sleep(SECOND_LOOK_SECONDS)
                damage = find_damage(folder, left, processes.share())
                if not folder.exists():
                    raise UserError(f"{self._name(step)} was removed by the run that is under way; run this again")
            if damage is not None:
                error = _unreadable(self.directory, step, damage)
        except UserError as found:
            error = found
        processes.raise_together(error)
        self._whole.update((step, item) for item in left)

    def _require_arrays(self, step: int, trees: Any) -> None:
        """Raises UserError where the checkpoint, which is whole, does not have the arrays asked for."""
        for item, tree in trees.items():
            known = json.loads((self.directory / str(step) / item / "_METADATA").read_text(encoding="utf-8"))
            there = {tuple(str(key["key"]) for key in leaf["key_metadata"]) for leaf in known["tree_metadata"].values()}
            wanted = {tuple(map(_key, path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
            lacking = ["/".join(path) for path in sorted(wanted - there)]
            require(
                not lacking,
                f"{self._name(step)} is of another version of this package: its {item} lack {comma_list(lacking[:3])}",
            )

    def _require_finite(self, step: int, trees: dict[str, Any]) -> None:
        """Raises UserError, in every process, naming an array that holds a NaN or an infinity."""
        error = None
        for path, array in jax.tree_util.tree_leaves_with_path(trees):
            if error is None and not _is_finite(array):
                name = "/".join(map(_key, path))
                error = UserError(
                    f"{self._name(step)} is no use: {name} is not finite; {_go_on_from(self.directory, step)}"
                )
        processes.raise_together(error)


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


def _key(entry: Any) -> str:
    """One step of a path through a tree, as Orbax names it."""
    return str(next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)))


def _is_finite(array: Any) -> bool:
    """Whether all that this process has of it is; looked at part by part, each once."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    parts = {str(shard.index): shard for shard in array.addressable_shards}
    return all(bool(np.isfinite(np.asarray(shard.data)).all()) for shard in parts.values())


def _require_checkpoints(directory: pathlib.Path) -> None:
    """Reads every checkpoint's validation loss before Orbax does, which does not say whose it could not read."""
    for step in steps_in(directory):
        folder = directory / str(step)
        path = folder / "metrics" / "metrics"
        require(folder.is_dir(), f"{folder} is in the place of a checkpoint but is not a folder; move it away")
        empty = not any((folder / item).is_dir() for item in (*TREE_ITEMS, *JSON_ITEMS))
        require(not empty, f"{folder} is in the place of a checkpoint but holds nothing of one; move it away")
        damage = find_damage(folder, ["metrics"]) if (folder / CHECKSUMS_NAME).exists() else None
        if damage is None and path.exists():  # Orbax takes one without for one that was not evaluated
            damage = _find_no_loss(path)
        if damage is not None:
            raise _unreadable(directory, step, damage)


def _find_no_loss(path: pathlib.Path) -> Damage | None:
    damage = find_undecodable_json(path)
    if damage is not None:
        return damage
    loss = json.loads(path.read_bytes()).get("validation_loss")
    number = isinstance(loss, float | int) and not math.isnan(loss)
    return None if number else Damage(path, f"has no validation loss, but {loss!r}")


def _unreadable(directory: pathlib.Path, step: int, damage: Damage) -> UserError:
    return UserError(f"checkpoint {step} in {directory} is unreadable ({damage}); {_go_on_from(directory, step)}")


def _go_on_from(directory: pathlib.Path, step: int) -> str:
    others = [other for other in steps_in(directory) if other != step]
    if not others:
        return "there is no other"
    if step not in steps_in(directory):
        return f"the last one is of step {others[-1]}"
    return f"move {directory / str(step)} away to go on from step {others[-1]}"


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]

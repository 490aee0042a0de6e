"""Checkpoints of a run: written in the background, atomically, and restored onto any mesh."""

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

SMALL_FILES_BYTES = 1 << 20  # a generous bound on a checkpoint's metadata, configuration and data state
LEAST_PART_BYTES = 1 << 20  # smaller replicated arrays are not split for writing: each part compiles a program
DELETED = "deleted"  # folder beside the checkpoints; a checkpoint is moved there before its files are removed
SECOND_LOOK_SECONDS = 1.0  # before a file counts as damaged: a running process may be deleting the checkpoint


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences Orbax's log: errors in its threads are also raised here, and should be reported once."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


class Checkpoints:
    """The checkpoints under `directory`, by step. Keeps the last few and the one with the lowest validation loss.

    A checkpoint has the parameters, the expert biases, the optimiser state, the data iterator's state and the run's
    configuration, each readable without the others, and checksums of their files. It gets its final name when it is
    complete. Reading first compares the files with their checksums, and requires arrays to be finite.
    """

    def __init__(self, directory: pathlib.Path, keep_last: int = 1, *, read_only: bool = False) -> None:
        """Opens the directory. For writing, creates it and removes what a killed run left incomplete.

        Raises:
          UserError: if something in it has a checkpoint's name but is not one, or if the validation loss of one is
            unreadable.
        """
        self.directory = directory
        self._read_only = read_only
        self._whole: set[tuple[int, str]] = set()  # (step, item) pairs whose checksums were compared
        _require_checkpoints(directory)
        if not read_only:
            directory.mkdir(parents=True, exist_ok=True)
            self._remove_deleted()
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
            todelete_subdir=None if read_only else DELETED,
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
        """Starts writing the state; returns when it is copied and may be overwritten. Waits for the previous save.

        Raises:
          OSError: if there is not enough disk space.
          Exception: the error of the previous save, if it failed.
        """
        self._manager.check_for_errors()
        self._remove_deleted()
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
        """The state, with the shardings of `abstract`, and the data iterator's state.

        Raises:
          UserError: if the checkpoint is damaged or of another configuration (naming the keys).
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
        """The parameters and expert biases only, with the shardings of the given abstract arrays.

        Raises:
          UserError: if the checkpoint is damaged.
        """
        saved = self._read(step, params=params, router_bias={"router_bias_LC": router_bias_LC})
        return saved.params, saved.router_bias["router_bias_LC"]

    def config(self, step: int) -> RunConfig:
        """The configuration of the run that wrote the checkpoint.

        Raises:
          UserError: if it is damaged, or is not a configuration of this version.
        """
        return from_json(json.dumps(self._read_json(step, "config")), self._name(step))

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          Exception: the error of the save, if it failed.
        """
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._remove_deleted()

    def close(self) -> None:
        try:
            self._manager.close()
            self._remove_deleted()
        finally:
            self._alias.close()

    def _remove_deleted(self) -> None:
        """Removes the files of deleted checkpoints, which Orbax has moved to DELETED.

        If a checkpoint were removed in place and the process killed meanwhile, the rest of it would look like damage.
        The folder itself stays, because Orbax may be moving checkpoints to it in the background.
        """
        folder = self.directory / DELETED
        if not self._read_only and processes.is_first() and folder.is_dir():
            for checkpoint in folder.iterdir():
                shutil.rmtree(checkpoint, ignore_errors=True)

    def _name(self, step: int) -> str:
        return f"checkpoint {step} in {self.directory}"

    def _require_room(self, state: TrainState) -> None:
        """Checks the disk space before writing: a disk that fills up half way gives tracebacks from Orbax's threads."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SMALL_FILES_BYTES
        if shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))

    def _seal(self) -> None:
        """Writes the checksums. Orbax calls this in one process, after all files are written and before the checkpoint
        gets its final name. So a checkpoint without checksums did not lose them: an older version wrote it."""
        unnamed = [entry for entry in self._alias.path.iterdir() if ocp.utils.TMP_DIR_SUFFIX in entry.name]
        for folder in unnamed:
            write_checksums(folder)

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        self._require_whole(step, [item])
        path = self.directory / str(step) / item / "metadata"
        return parse_json_object(path.read_text(encoding="utf-8"), str(path))

    def _read(self, step: int, **trees: Any) -> Any:
        """The arrays of some items, with the shapes, dtypes and shardings of the abstract arrays in `trees`."""
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
        """Compares the files of some items with their checksums, once; processes share the work.

        Raises:
          UserError: if a file is not what was written, or a running process has deleted the checkpoint.
        """
        left = [item for item in items if (step, item) not in self._whole]
        folder, error = self.directory / str(step), None
        try:
            damage = find_damage(folder, left, processes.share())
            if damage is not None and self._read_only and (self.directory.parent / TRAIN_LOCK).exists():
                time.sleep(SECOND_LOOK_SECONDS)
                damage = find_damage(folder, left, processes.share())
                if not folder.exists():
                    raise UserError(f"{self._name(step)} was deleted by the running training; run this again")
            if damage is not None:
                error = _unreadable(self.directory, step, damage)
        except UserError as found:
            error = found
        processes.raise_together(error)
        self._whole.update((step, item) for item in left)

    def _require_arrays(self, step: int, trees: Any) -> None:
        """Raises UserError if the checkpoint, known to be undamaged, lacks some of the requested arrays."""
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
        """Raises UserError, in every process, if an array holds a NaN or an infinity; the message names it."""
        error = None
        for path, array in jax.tree_util.tree_leaves_with_path(trees):
            if error is None and not _is_finite(array):
                name = "/".join(map(_key, path))
                error = UserError(
                    f"{self._name(step)} is unusable: {name} is not finite; {_advice(self.directory, step)}"
                )
        processes.raise_together(error)


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Orbax's handlers, except for replicated arrays: by default it compiles a slice program for every part of these,
    however small, which on eight devices adds seconds to a run's first checkpoint."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_PART_BYTES)
    trees = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add(None, args, trees)  # None: for any item
    return registry


def _key(entry: Any) -> str:
    """One entry of a tree path, by the name Orbax gives it."""
    return str(next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)))


def _is_finite(array: Any) -> bool:
    """Whether this process's part of an array is finite. Looks at each distinct shard once."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    parts = {str(shard.index): shard for shard in array.addressable_shards}
    return all(bool(np.isfinite(np.asarray(shard.data)).all()) for shard in parts.values())


def _require_checkpoints(directory: pathlib.Path) -> None:
    """Reads every checkpoint's validation loss before Orbax does, whose errors do not say which one is unreadable."""
    for step in steps_in(directory):
        folder = directory / str(step)
        path = folder / "metrics" / "metrics"
        require(folder.is_dir(), f"{folder} is in the place of a checkpoint but is not a folder; move it away")
        empty = not any((folder / item).is_dir() for item in (*TREE_ITEMS, *JSON_ITEMS))
        require(not empty, f"{folder} is in the place of a checkpoint but holds nothing of one; move it away")
        damage = find_damage(folder, ["metrics"]) if (folder / CHECKSUMS_NAME).exists() else None
        if damage is None and path.exists():  # without one, Orbax takes the checkpoint as not evaluated
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
    return UserError(f"checkpoint {step} in {directory} is unreadable ({damage}); {_advice(directory, step)}")


def _advice(directory: pathlib.Path, step: int) -> str:
    """What to do about an unusable checkpoint of this step."""
    others = [other for other in steps_in(directory) if other != step]
    if not others:
        return "there is no other checkpoint"
    if step not in steps_in(directory):
        return f"the last one is of step {others[-1]}"
    return f"move {directory / str(step)} away to resume from step {others[-1]}"


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]

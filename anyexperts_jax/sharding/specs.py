"""Shardings: those of parameters from their logical axes, those of a batch from the names of its fields."""

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import comma_list, require
from anyexperts_jax.sharding.rules import ShardingRules, as_tuple

DEFAULT_RULES = ShardingRules()
# B, then possibly T, then letters or digits other than T: a T in a later place would be an axis that nobody splits.
_DIMENSIONS = re.compile(r"B(T?)[A-SU-Z0-9]*")


def require_automatic(mesh: Mesh) -> None:
    """Checks that all axes of a mesh are automatic. The model constrains the layouts of a few arrays and leaves the
    others to the compiler; on explicit axes every operation would have to state its layout.

    Raises:
      UserError: naming the axes that are not automatic.
    """
    others = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Auto]
    require(
        not others,
        f"mesh axes {comma_list(others)} are not automatic; make the mesh with AxisType.Auto, as make_mesh does",
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> dict[str, NamedSharding]:
    """The sharding of every array of a `Batch`, by field: sequences are split, and so are positions if there are any.

    Raises:
      UserError: for a field whose name does not end in its dimensions, and for explicit axes.
    """
    require_automatic(mesh)
    fields = [field.name for field in dataclasses.fields(Batch)]
    return {name: NamedSharding(mesh, rules.spec(batch_axes(name))) for name in fields}


def batch_axes(field: str) -> tuple[str, ...]:
    """The logical axes that split an array of the batch, read from the dimensions at the end of its name.

    B (sequences) comes first, and T (positions) second or not at all: "tokens_BT", "patches_BPX".

    Raises:
      UserError: for any other name. Its array would otherwise be replicated on every device without notice.
    """
    letters = field.rpartition("_")[2]
    known = bool(_DIMENSIONS.fullmatch(letters)) and "_" in field
    require(
        known,
        f"batch field {field!r}: its name must end in its dimensions, B first and T, if any, second, as in tokens_BT",
    )
    return ("batch", "length") if letters[1:2] == "T" else ("batch",)


def batch_shards(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> int:
    """The number of parts into which the sequences of a batch are split. It must divide the batch size."""
    return parts(mesh, rules.spec(("batch",))[0])


def batch_rows(
    mesh: Mesh, batch_size: int, devices: Collection[Any] | None = None, rules: ShardingRules = DEFAULT_RULES
) -> tuple[int, ...]:
    """The rows of a batch that `devices` hold, in order; by default those of this process.

    Processes that share a sequence or a weight hold the same rows.
    """
    held = mesh.local_devices if devices is None else devices
    indices = NamedSharding(mesh, rules.spec(("batch",))).devices_indices_map((batch_size,))
    return tuple(sorted({row for device in held for row in range(batch_size)[indices[device][0]]}))


def shard_batch(mesh: Mesh, batch: Batch, batch_size: int | None = None, rules: ShardingRules = DEFAULT_RULES) -> Batch:
    """Puts a batch onto the mesh.

    Args:
      batch_size: the size of the global batch, if `batch` has only its rows `batch_rows`; None: `batch` is global.
    """
    shardings = batch_shardings(mesh, rules)
    if batch_size is None or len(mesh.local_devices) == mesh.size:
        return Batch(**{name: jax.device_put(getattr(batch, name), sharding) for name, sharding in shardings.items()})
    first_row = {row: place for place, row in enumerate(batch_rows(mesh, batch_size, rules=rules))}

    def put(held: Any, sharding: NamedSharding) -> jax.Array:
        held = np.asarray(held)

        # JAX asks for each local shard by its index in the global array; `held` has this process's rows only.
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            place = first_row[start]
            return held[(slice(place, place + stop - start), *index[1:])]

        return jax.make_array_from_callback((batch_size, *held.shape[1:]), sharding, part)

    return Batch(**{name: put(getattr(batch, name), sharding) for name, sharding in shardings.items()})


def param_shardings(mesh: Mesh, logical_axes: Any, abstract_params: Any, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """The NamedSharding of every parameter.

    Args:
      logical_axes: a tree like the parameters', with a tuple of logical axis names at each leaf.
      abstract_params: the parameters, as arrays or ShapeDtypeStructs.

    Raises:
      UserError: naming the parameter whose axes are unknown, too few, or not divisible by the mesh; for explicit axes.
    """
    require_automatic(mesh)

    def sharding(path: Any, array: Any, axes: tuple[str, ...]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        require(len(axes) == len(array.shape), f"parameter {name}: logical axes {axes} for shape {array.shape}")
        spec = rules.spec(axes)
        # JAX refuses uneven splits too, but later and without the name of the parameter.
        for size, axis, mesh_axes in zip(array.shape, axes, spec, strict=True):
            count = parts(mesh, mesh_axes)
            indivisible = f"parameter {name}: {axis}={size} does not split over {mesh_axes} of {count} devices"
            require(size % count == 0, indivisible)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, abstract_params, logical_axes)


def require_divided(mesh: Mesh, tokens_spec: PartitionSpec, sequences: int, positions: int) -> None:
    """Checks that the tokens split evenly over the mesh axes of `tokens_spec`, those of batch and length.

    Raises:
      UserError: naming the size and the axes.
    """
    for what, size, axes in zip(("sequences", "positions"), (sequences, positions), tokens_spec, strict=True):
        count = parts(mesh, axes)
        require(size % count == 0, f"{size} {what} do not split over mesh axes {axes} of {count} devices")


def parts(mesh: Mesh, mesh_axes: Any) -> int:
    """The number of parts into which a dimension on `mesh_axes` is split."""
    names = () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    return math.prod(mesh.shape[name] for name in names)


def token_shards(mesh: dict[str, int]) -> int:
    """Returns the number of parts into which a mesh of these sizes splits the positions of a batch."""
    return math.prod(mesh[axis] for axis in (*as_tuple(DEFAULT_RULES.batch), *as_tuple(DEFAULT_RULES.length)))

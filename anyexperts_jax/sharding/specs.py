"""Trees of shardings: for parameters from their logical axes, for a batch from its fields' names."""

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
from anyexperts_jax.sharding.rules import ShardingRules

DEFAULT_RULES = ShardingRules()
_DIMENSIONS = re.compile(r"B(T?)[A-SU-Z0-9]*")


def require_automatic(mesh: Mesh) -> None:
    """Refuses a mesh with explicit axes: the model names layouts at its seams and leaves those between to the compiler.

    Raises:
      UserError: naming the axes.
    """
    others = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Auto]
    require(
        not others,
        f"mesh axes {comma_list(others)} are not automatic; make the mesh with AxisType.Auto, as make_mesh does",
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> dict[str, NamedSharding]:
    """The sharding of every array of a `Batch` by its field: sequences split, and positions where there are any.

    Raises:
      UserError: a field whose name does not say its dimensions, explicit axes.
    """
    require_automatic(mesh)
    fields = [field.name for field in dataclasses.fields(Batch)]
    return {name: NamedSharding(mesh, rules.spec(batch_axes(name))) for name in fields}


def batch_axes(field: str) -> tuple[str, ...]:
    """The logical axes of a batch's array, those that are split: the letters at its name's end are its dimensions.

    B, sequences, comes first, and T, positions, second or not at all: "tokens_BT", "patches_BPX".

    Raises:
      UserError: for any other name, whose array would stay whole on every device and nobody would see it.
    """
    letters = field.rpartition("_")[2]
    known = bool(_DIMENSIONS.fullmatch(letters)) and "_" in field
    require(
        known,
        f"batch field {field!r}: its name must end in its dimensions, B first and T, if any, second, as in tokens_BT",
    )
    return ("batch", "length") if letters[1:2] == "T" else ("batch",)


def batch_shards(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> int:
    """The number of parts the sequences of a batch are split into; it must divide the batch size."""
    return parts(mesh, rules.spec(("batch",))[0])


def batch_rows(
    mesh: Mesh, batch_size: int, devices: Collection[Any] | None = None, rules: ShardingRules = DEFAULT_RULES
) -> tuple[int, ...]:
    """The rows of a batch that are on `devices`, by default those of this process, in order.

    Processes that split a sequence or a weight between them hold the same rows.
    """
    held = mesh.local_devices if devices is None else devices
    indices = NamedSharding(mesh, rules.spec(("batch",))).devices_indices_map((batch_size,))
    return tuple(sorted({row for device in held for row in range(batch_size)[indices[device][0]]}))


def shard_batch(mesh: Mesh, batch: Batch, batch_size: int | None = None, rules: ShardingRules = DEFAULT_RULES) -> Batch:
    """Puts a batch onto the mesh.

    Args:
      batch_size: of the whole batch, of which `batch` holds `batch_rows`; None: `batch` is the whole.
    """
    shardings = batch_shardings(mesh, rules)
    if batch_size is None or len(mesh.local_devices) == mesh.size:
        return Batch(**{name: jax.device_put(getattr(batch, name), sharding) for name, sharding in shardings.items()})
    first_row = {row: place for place, row in enumerate(batch_rows(mesh, batch_size, rules=rules))}

    def put(held: Any, sharding: NamedSharding) -> jax.Array:
        held = np.asarray(held)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            place = first_row[start]
            return held[(slice(place, place + stop - start), *index[1:])]

        return jax.make_array_from_callback((batch_size, *held.shape[1:]), sharding, part)

    return Batch(**{name: put(getattr(batch, name), sharding) for name, sharding in shardings.items()})


def param_shardings(mesh: Mesh, logical_axes: Any, abstract_params: Any, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """The NamedSharding of every parameter.

    Args:
      logical_axes: the parameters' tree with a tuple of logical axis names at each leaf.
      abstract_params: the same tree of arrays or ShapeDtypeStructs.

    Raises:
      UserError: naming the parameter whose axes are unknown, too few, or not divisible by the mesh; explicit axes.
    """
    require_automatic(mesh)

    def sharding(path: Any, array: Any, axes: tuple[str, ...]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        require(len(axes) == len(array.shape), f"parameter {name}: logical axes {axes} for shape {array.shape}")
        spec = rules.spec(axes)
        for size, axis, mesh_axes in zip(array.shape, axes, spec, strict=True):
            count = parts(mesh, mesh_axes)
            indivisible = f"parameter {name}: {axis}={size} does not split over {mesh_axes} of {count} devices"
            require(size % count == 0, indivisible)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, abstract_params, logical_axes)


def require_divided(mesh: Mesh, tokens_spec: PartitionSpec, sequences: int, positions: int) -> None:
    """Refuses tokens that do not split evenly over the mesh axes of `tokens_spec`, those of batch and length.

    Raises:
      UserError: naming the size and the axes.
    """
    for what, size, axes in zip(("sequences", "positions"), (sequences, positions), tokens_spec, strict=True):
        count = parts(mesh, axes)
        require(size % count == 0, f"{size} {what} do not split over mesh axes {axes} of {count} devices")


def parts(mesh: Mesh, mesh_axes: Any) -> int:
    """Into how many parts a dimension on `mesh_axes` is split."""
    names = () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    return math.prod(mesh.shape[name] for name in names)

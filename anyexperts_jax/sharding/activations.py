"""Sharding constraints on activations, where the compiler would otherwise replicate arrays between two layouts."""

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.rules import as_tuple


def split_tokens(x: Float[Array, "B *rest"], placement: Placement | None, axes: tuple[str, ...]) -> Array:
    """Constrains `x`: its leading dimensions, with logical `axes`, are split by the rules, the others are not split."""
    if placement is None or placement.mesh.size == 1:
        return x
    return _constrain(x, placement, placement.rules.spec(axes))


def take_embeddings(
    table_RD: Float[Array, "R D"], ids: Int[Array, "*ids"], placement: Placement | None, axes: tuple[str, ...]
) -> Float[Array, "*ids D"]:
    """Looks up rows of a table whose width is split over mesh axes that also split the batch. NaN for an id out of
    range.

    Each device looks up its columns for the sequences of all devices it shares the table with. One all-to-all then
    turns these into whole rows of its own sequences. Without the constraints XLA replicates the rows between the two
    layouts.

    Args:
      axes: the logical axes of `ids`.
    """

    def take(ids: Array) -> Array:
        return table_RD.at[ids].get(mode="fill", fill_value=jax.numpy.nan)

    if placement is None or placement.mesh.size == 1:
        return take(ids)
    spec = placement.rules.spec(axes)
    batch, rest = as_tuple(spec[0]), tuple(spec[1:])
    width = as_tuple(placement.rules.embed)
    if not width or not set(width) <= set(batch):
        return _constrain(take(ids), placement, spec)
    others = tuple(axis for axis in batch if axis not in width)
    # Three layouts in turn: the width split as the table has it; then the batch split over the same axes in its place,
    # which is the all-to-all; then the axes in the order of the rules.
    rows = take(_constrain(ids, placement, PartitionSpec(others, *rest)))
    whole = (None,) * (len(axes) - 1 - len(rest))
    rows = _constrain(rows, placement, PartitionSpec(others, *rest, *whole, width))
    rows = _constrain(rows, placement, PartitionSpec((*others, *width), *rest))
    return _constrain(rows, placement, spec)


def split_buffers(x_ECD: Float[Array, "E C D"], placement: Placement | None) -> Float[Array, "E C D"]:
    """Constrains the buffers of `dispatch="capacity"`: experts are split like their weights, and rows over the other
    mesh axes of the batch.

    Without the constraint XLA repeats an expert's rows on every device that has a copy of the expert. Mesh axes that do
    not divide the rows are left out.
    """
    if placement is None or placement.mesh.size == 1:
        return x_ECD
    expert, rows, left = as_tuple(placement.rules.expert), [], x_ECD.shape[1]
    for axis in as_tuple(placement.rules.batch):
        if axis not in expert and left % placement.mesh.shape[axis] == 0:
            rows.append(axis)
            left //= placement.mesh.shape[axis]
    return _constrain(x_ECD, placement, PartitionSpec(expert, tuple(rows), None))


def _constrain(x: Array, placement: Placement, spec: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(placement.mesh, spec))

"""Where activations live: constraints that keep the compiler from replicating what two layouts claim."""

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.rules import as_tuple


def split_tokens(x: Float[Array, "B *rest"], placement: Placement | None, axes: tuple[str, ...]) -> Array:
    """`x` with its leading dimensions, of logical `axes`, where the rules put them and the others whole."""
    if placement is None or placement.mesh.size == 1:
        return x
    return _constrain(x, placement, placement.rules.spec(axes))


def take_embeddings(
    table_RD: Float[Array, "R D"], ids: Int[Array, "*ids"], placement: Placement | None, axes: tuple[str, ...]
) -> Float[Array, "*ids D"]:
    """Rows of a table whose width is split over mesh axes that split the batch too; NaN for an id past the table.

    Each device takes its columns for all sequences of the devices it shares the table with, and one all-to-all makes
    whole rows of its own sequences of them. Left to itself, XLA replicates the rows between the two layouts.

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
    rows = take(_constrain(ids, placement, PartitionSpec(others, *rest)))
    whole = (None,) * (len(axes) - 1 - len(rest))
    rows = _constrain(rows, placement, PartitionSpec(others, *rest, *whole, width))
    rows = _constrain(rows, placement, PartitionSpec((*others, *width), *rest))
    return _constrain(rows, placement, spec)


def split_buffers(x_ECD: Float[Array, "E C D"], placement: Placement | None) -> Float[Array, "E C D"]:
    """The buffers of `dispatch="capacity"`: experts with their weights, rows over the batch's other mesh axes.

    Left to itself, XLA repeats an expert's rows on all devices that have a copy of it. A mesh axis that does not divide
    the rows does not split them.
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

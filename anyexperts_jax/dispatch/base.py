"""The common part of the index-based dispatchers: sorting the slots by expert, and assigning them to rows of a buffer.
`ops.row_map` has the gathers for dispatch and combine."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops.row_map import RowMap
from anyexperts_jax.ops.slot_order import SlotOrder
from anyexperts_jax.routing.plan import RoutingPlan

_INT32_LIMIT = 2**31


class DispatchStats(NamedTuple):
    """Counts of a dispatch."""

    dropped: Int[Array, ""]  # int32, real slots that exceeded a capacity
    rows: Int[Array, ""]  # int32, rows of the expert matmuls, including padding


# An entry of `core.registries.DISPATCHERS`: (x_ND, plan, experts, execution, placement) -> (y_ND, stats). y is the
# weighted sum of each token's real experts in float32 or wider, without the virtual ones; the stats are summed over all
# devices. With placement=None, or a mesh of one device, everything lies on one device.
Dispatcher = Callable[..., tuple[Float[Array, "N D"], DispatchStats]]


def sort_slots(
    expert_ids_NK: Int[Array, "N K"], num_experts: int, num_sequences: int = 1, *, most_real: int | None = None
) -> SlotOrder:
    """Sorts all slots by (expert, position, sequence, rank). N = num_sequences * T, sequence after sequence.

    Position is sorted before sequence, so that a capacity drops the latest positions of all sequences first. So no
    token is dropped because of a later one, as causality requires.

    Args:
      most_real: the most slots that can be real; the order ends there. None: all of them.
    """
    tokens, k = expert_ids_NK.shape
    positions = tokens // num_sequences
    ids_R = expert_ids_NK.reshape(num_sequences, positions, k).swapaxes(0, 1).reshape(-1)
    order_R = _stable_order(ids_R, num_experts)
    # The inverse permutation. Integers with unique indices are the one thing scattered here: no order, no gradient.
    places_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(order_R.size, dtype=jnp.int32), unique_indices=True)
    places_NK = places_R.reshape(positions, num_sequences, k).swapaxes(0, 1).reshape(tokens, k)
    position, sequence, rank = jnp.unravel_index(order_R, (positions, num_sequences, k))
    counts_E = jnp.zeros(num_experts, jnp.int32).at[ids_R].add(1, mode="drop")
    return SlotOrder(
        slots_R=((sequence * positions + position) * k + rank)[:most_real],
        places_NK=places_NK,
        starts_E=jnp.cumsum(counts_E, dtype=jnp.int32) - counts_E,
        counts_E=counts_E,
    )


def _stable_order(ids_R: Int[Array, "R"], num_experts: int) -> Int[Array, "R"]:
    """argsort by id. Packing id and slot into one int32 key sorts several times faster than sorting a pair of arrays,
    and makes the keys unique, so that the sort need not be stable."""
    bits = max(1, (ids_R.size - 1).bit_length())
    if (num_experts + 1) << bits > _INT32_LIMIT:
        return jnp.argsort(ids_R, stable=True).astype(jnp.int32)
    keys_R = (ids_R.astype(jnp.int32) << bits) | jnp.arange(ids_R.size, dtype=jnp.int32)
    return lax.sort(keys_R, is_stable=False) & ((1 << bits) - 1)


def buffer_row_map(
    order: SlotOrder,
    ids_NK: Int[Array, "N K"],
    capacity: int,
    part: tuple[Int[Array, "E"], Int[Array, "E"]] | None = None,
) -> RowMap:
    """The map in which row e * capacity + c holds slot number c of the slots with id e, in the sorted order.

    Args:
      order: the order of the slots by `ids_NK`.
      ids_NK: the expert, or the device, of each slot.
      part: (number of the first slot, how many slots up to `capacity`) of each id. None: from 0 on, as many as fit.
    """
    num_ids, k = order.counts_E.shape[0], ids_NK.shape[1]
    first_E, held_E = part or (jnp.zeros_like(order.counts_E), jnp.minimum(order.counts_E, capacity))
    start_E, row_C = order.starts_E + first_E, jnp.arange(capacity, dtype=jnp.int32)
    place_EC = jnp.minimum(start_E[:, None] + row_C[None], order.slots_R.size - 1)
    slots_R = order.slots_R[place_EC.reshape(-1)]
    id_NK = jnp.minimum(ids_NK, num_ids - 1)
    row_NK = order.places_NK - start_E[id_NK]
    held_NK = (ids_NK < num_ids) & (row_NK >= 0) & (row_NK < held_E[id_NK])
    return RowMap(
        tokens_R=slots_R // k,
        slots_R=slots_R,
        live_R=(row_C[None] < held_E[:, None]).reshape(-1),
        rows_NK=jnp.where(held_NK, id_NK * capacity + row_NK, 0),
        held_NK=held_NK,
    )


def add_virtual_output(y_ND: Float[Array, "N D"], x_ND: Float[Array, "N D"], plan: RoutingPlan) -> Float[Array, "N D"]:
    """Adds the virtual experts' output to the sum of the real experts; returns x's dtype."""
    if plan.spec.virtual_output == "identity":
        y_ND = y_ND + plan.virtual_weight_N[:, None].astype(y_ND.dtype) * x_ND.astype(y_ND.dtype)
    return y_ND.astype(x_ND.dtype)

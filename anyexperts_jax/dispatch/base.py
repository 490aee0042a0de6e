"""What the index-based forms share: one sort of the slots. The gathers each way are `ops.row_map`'s."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from anyexperts_jax.ops.slot_order import SlotOrder

_INT32_LIMIT = 2**31


class DispatchStats(NamedTuple):
    """What a dispatch did with the real slots."""

    dropped: Int[Array, ""]  # int32, real slots that found no room
    rows: Int[Array, ""]  # int32, rows the expert matmuls were given, padding included


def sort_slots(expert_ids_NK: Int[Array, "N K"], num_experts: int, num_sequences: int = 1) -> SlotOrder:
    """Sorts all slots by (expert, position, sequence, rank), where N = num_sequences * T lies sequence after sequence.

    Position goes before sequence so that whoever cuts an expert's slots short cuts late positions, of every
    sequence alike: no token is dropped because of a later one.
    """
    tokens, k = expert_ids_NK.shape
    positions = tokens // num_sequences
    ids_R = expert_ids_NK.reshape(num_sequences, positions, k).swapaxes(0, 1).reshape(-1)
    order_R = _stable_order(ids_R, num_experts)
    places_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(order_R.size), unique_indices=True)
    places_NK = places_R.reshape(positions, num_sequences, k).swapaxes(0, 1).reshape(tokens, k)
    position, sequence, rank = jnp.unravel_index(order_R, (positions, num_sequences, k))
    counts_E = jnp.zeros(num_experts, jnp.int32).at[ids_R].add(1, mode="drop")
    return SlotOrder(
        slots_R=(sequence * positions + position) * k + rank,
        places_NK=places_NK,
        starts_E=jnp.cumsum(counts_E) - counts_E,
        counts_E=counts_E,
    )


def _stable_order(ids_R: Int[Array, "R"], num_experts: int) -> Int[Array, "R"]:
    """argsort by id. Id and slot packed into one int32 key sort several times faster than a pair of arrays."""
    bits = max(1, (ids_R.size - 1).bit_length())
    if (num_experts + 1) << bits > _INT32_LIMIT:
        return jnp.argsort(ids_R, stable=True).astype(jnp.int32)
    keys_R = (ids_R.astype(jnp.int32) << bits) | jnp.arange(ids_R.size, dtype=jnp.int32)
    return lax.sort(keys_R, is_stable=False) & ((1 << bits) - 1)

"""What the index-based forms share: one sort of the slots, and a pair of gathers each way.

Nothing here scatters floats, forward or backward: a row knows its token and a slot knows its row, so every
transpose is again a gather. A token's K slots are summed by K fused multiply-adds; no [N, K, D] array exists.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.ops.slot_order import SlotOrder

_INT32_LIMIT = 2**31


class DispatchStats(NamedTuple):
    """What a dispatch did with the real slots."""

    dropped: Int[Array, ""]  # int32, real slots that found no room
    rows: Int[Array, ""]  # int32, rows the expert matmuls were given, padding included


class RowMap(NamedTuple):
    """Which token each buffer row holds, and where each slot's row is."""

    tokens_R: Int[Array, "R"]
    slots_R: Int[Array, "R"]  # slot n * K + k the row serves
    live_R: Bool[Array, "R"]  # False: the row holds no slot, its token and slot are arbitrary
    rows_NK: Int[Array, "N K"]  # arbitrary where `held_NK` is False
    held_NK: Bool[Array, "N K"]  # False: an empty slot, or one that found no room


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


@jax.custom_vjp
def take_rows(x_ND: Float[Array, "N D"], row_map: RowMap) -> Float[Array, "R D"]:
    """Each row's token; zero in rows without one."""
    return jnp.where(row_map.live_R[:, None], x_ND[row_map.tokens_R], 0)


def _take_rows_backward(row_map: RowMap, d_x_RD: Float[Array, "R D"]) -> tuple[Array, None]:
    return _sum_slots(d_x_RD, row_map, row_map.held_NK).astype(d_x_RD.dtype), None


take_rows.defvjp(lambda x_ND, row_map: (take_rows(x_ND, row_map), row_map), _take_rows_backward)


@jax.custom_vjp
def combine_rows(y_RD: Float[Array, "R D"], weights_NK: Float[Array, "N K"], row_map: RowMap) -> Float[Array, "N D"]:
    """The sum over each token's held slots of weight * row, accumulated and returned in float32 at least."""
    return _sum_slots(y_RD, row_map, jnp.where(row_map.held_NK, weights_NK, 0))


def _combine_rows_backward(
    residuals: tuple[Array, Array, RowMap], d_ND: Float[Array, "N D"]
) -> tuple[Array, Array, None]:
    y_RD, weights_NK, row_map = residuals
    weight_R = jnp.where(row_map.live_R, weights_NK.reshape(-1)[row_map.slots_R], 0)
    d_y_RD = (d_ND[row_map.tokens_R] * weight_R[:, None]).astype(y_RD.dtype)
    d_weights_KN = [(y_RD[row_map.rows_NK[:, k]] * d_ND).sum(-1) for k in range(weights_NK.shape[1])]
    d_weights_NK = jnp.where(row_map.held_NK, jnp.stack(d_weights_KN, axis=1), 0).astype(weights_NK.dtype)
    return d_y_RD, d_weights_NK, None


combine_rows.defvjp(lambda *operands: (combine_rows(*operands), operands), _combine_rows_backward)


def _sum_slots(y_RD: Float[Array, "R D"], row_map: RowMap, weights_NK: Array) -> Float[Array, "N D"]:
    wide = jnp.promote_types(y_RD.dtype, jnp.float32)
    total_ND = jnp.zeros((weights_NK.shape[0], y_RD.shape[1]), wide)
    for k in range(weights_NK.shape[1]):
        total_ND += y_RD[row_map.rows_NK[:, k]].astype(wide) * weights_NK[:, k, None].astype(wide)
    return total_ND

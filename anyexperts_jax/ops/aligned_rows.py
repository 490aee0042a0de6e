"""The block-aligned buffer: the rows of all experts in one array, each expert's starting at a multiple of `block`.

So a tile of `block` rows, or of a divisor of it, belongs to a single expert. Slots without a real expert have no row.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from anyexperts_jax.core.errors import require
from anyexperts_jax.ops.row_map import RowMap
from anyexperts_jax.ops.slot_order import SlotOrder


def num_aligned_rows(num_slots: int, num_experts: int, block: int) -> int:
    """R, the rows that `num_slots` slots need whatever their distribution over the experts; at least one block.

    The bound is tight: each of `num_experts` experts may have a single slot in its last block.
    """
    most_padding = min(num_slots, num_experts) * (block - 1)
    return max(1, (num_slots + most_padding) // block) * block


def aligned_starts(counts_E: Int[Array, "E"], block: int) -> Int[Array, "E"]:
    """First row of each expert when the experts are packed as tightly as blocks allow."""
    sizes_E = -(-counts_E // block) * block
    return jnp.cumsum(sizes_E, dtype=jnp.int32) - sizes_E


def align_rows(order: SlotOrder, block: int) -> tuple[RowMap, Int[Array, "E"]]:
    """(map between slots and the R = `num_aligned_rows` rows, first row of each expert).

    Raises:
      UserError: if `block` is not positive.
    """
    require(block >= 1, f"block={block} must be >= 1")
    num_experts, k = order.counts_E.shape[0], order.places_NK.shape[1]
    rows = num_aligned_rows(order.slots_R.size, num_experts, block)
    starts_E = aligned_starts(order.counts_E, block)
    expert_B = experts_of_blocks(starts_E, order.counts_E, rows // block, block)
    row_BR = jnp.arange(rows, dtype=jnp.int32).reshape(-1, block)
    in_expert_BR = row_BR - starts_E[expert_B][:, None]
    live_BR = (in_expert_BR >= 0) & (in_expert_BR < order.counts_E[expert_B][:, None])
    place_BR = jnp.where(live_BR, in_expert_BR + order.starts_E[expert_B][:, None], 0)
    slots_R = order.slots_R[place_BR.reshape(-1)]
    # A slot's row is its place in the order plus the padding of all experts before its own. Those are the experts whose
    # last place the slot lies beyond, so comparing replaces a look-up by expert.
    padding_E = -order.counts_E % block
    past_NKE = order.places_NK[:, :, None] >= (order.starts_E + order.counts_E)[None, None]
    pushed_NK = jnp.where(past_NKE, padding_E[None, None], 0).sum(-1)
    rows_NK = jnp.where(order.held_NK, order.places_NK + pushed_NK, 0)
    row_map = RowMap(slots_R // k, slots_R, live_BR.reshape(-1), rows_NK, order.held_NK)
    return row_map, starts_E


def experts_of_blocks(
    starts_E: Int[Array, "E"], counts_E: Int[Array, "E"], num_blocks: int, block: int
) -> Int[Array, "num_blocks"]:
    """The expert that owns each block of `block` rows; arbitrary for a block without live rows."""
    first_row_B1 = jnp.arange(num_blocks, dtype=jnp.int32)[:, None] * block
    ends_E = starts_E + counts_E
    own_BE = (first_row_B1 >= starts_E[None]) & (first_row_B1 < ends_E[None])
    return jnp.argmax(own_BE, axis=1)


def rows_of_blocks(
    starts_E: Int[Array, "E"], counts_E: Int[Array, "E"], num_blocks: int, block: int
) -> Int[Array, "num_blocks"]:
    """The number of live rows in each block; they come first in the block."""
    first_row_B1 = jnp.arange(num_blocks, dtype=jnp.int32)[:, None] * block
    ends_E = starts_E + counts_E
    rest_BE = jnp.where(first_row_B1 >= starts_E[None], ends_E[None] - first_row_B1, 0)
    return jnp.clip(rest_BE, 0, block).max(axis=1)

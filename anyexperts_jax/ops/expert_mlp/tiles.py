"""The tiles of a buffer, [E, C, D] or block-aligned, in the order in which a kernel visits them: live tiles first.

A tile is a block of rows of one expert. The kernel's grid runs along the list and stops early, so dead tiles at the end
cost nothing; and the next expert's weights are fetched while a live tile computes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class TileList(NamedTuple):
    """All tiles: the live ones, then the first block of each empty expert, then the rest. One more entry repeats the
    last."""

    # The rows that a step writes.
    expert: Int[Array, "tiles"]
    block: Int[Array, "tiles"]
    # The rows, and the expert's weights, that a step reads. After the live tiles these repeat the last live tile:
    # Pallas copies a block only if its index changes, so dead tiles fetch nothing.
    source_expert: Int[Array, "tiles"]
    source_block: Int[Array, "tiles"]
    rows: Int[Array, "tiles"]  # live rows; 0 after the live tiles
    opens: Int[Array, "tiles"]  # 1: first tile of its expert in the list
    closes: Int[Array, "tiles"]  # 1: last live tile of its expert in the list, or the only one of an empty expert
    num_live: Int[Array, ""]
    num_touched: Int[Array, ""]  # live tiles plus empty experts: the prefix of the list in which every expert occurs


def deal_tiles(tiles: TileList, cores: int) -> TileList:
    """Divides the list into parts of equal length, one per core (at most two). Live tiles come first in each part and
    are shared evenly. The last part may repeat its last tile. After its live tiles, a part's source stays at its own
    last live tile, for the reason given in `TileList`."""
    total = tiles.rows.size - 1
    steps = -(-total // cores)
    core, step = jnp.divmod(jnp.arange(cores * steps, dtype=jnp.int32), steps)
    share = -(-tiles.num_live // cores)
    first = jnp.minimum(core * share, tiles.num_live)
    live = jnp.minimum(tiles.num_live - first, share)
    dead = tiles.num_live + core * steps - first + step - live
    again = jnp.where(step > live, total - 1, first + live - 1)
    place = jnp.where(step < live, first + step, jnp.where(dead < total, dead, again))
    source = jnp.maximum(first + jnp.minimum(step, live - 1), 0)
    return tiles._replace(
        expert=tiles.expert[place],
        block=tiles.block[place],
        source_expert=tiles.source_expert[source],
        source_block=tiles.source_block[source],
        rows=tiles.rows[place],
        opens=tiles.opens[place],
        closes=tiles.closes[place],
    )


def list_tiles(counts_E: Int[Array, "E"], capacity: int, block: int) -> TileList:
    """The tiles of `block` rows that cover `capacity` rows per expert; the last tile may reach beyond `capacity`.

    Experts come in order. Within one, the block that may be partly filled comes first, so that the fetch of the next
    expert's weights overlaps with a full block.
    """
    num_experts, blocks = counts_E.shape[0], -(-capacity // block)
    total = num_experts * blocks
    counts_E = jnp.clip(counts_E.astype(jnp.int32), 0, capacity)
    place = jnp.arange(total, dtype=jnp.int32)
    expert, block_at = place // blocks, blocks - 1 - place % blocks
    live = block_at * block < counts_E[expert]
    opening = (block_at == 0) & ~live
    # A stable sort by group, as one sort of unique integers: the place in the list breaks ties.
    group = jnp.where(live, 0, jnp.where(opening, 1, 2))
    order = lax.sort(group * total + place, is_stable=False) % total
    num_live, num_touched = live.sum(dtype=jnp.int32), (live | opening).sum(dtype=jnp.int32)
    order = jnp.append(order, order[-1])
    source = order[jnp.clip(jnp.arange(total + 1, dtype=jnp.int32), 0, jnp.maximum(num_live - 1, 0))]
    expert, block_at = expert[order], block_at[order]
    rows = jnp.clip(counts_E[expert] - block_at * block, 0, block)
    return TileList(
        expert=expert,
        block=block_at,
        source_expert=source // blocks,
        source_block=blocks - 1 - source % blocks,
        rows=rows,
        opens=((block_at + 1) * block >= counts_E[expert]).astype(jnp.int32),
        closes=(block_at == 0).astype(jnp.int32),
        num_live=num_live,
        num_touched=num_touched,
    )


def list_aligned_tiles(
    starts_E: Int[Array, "E"], counts_E: Int[Array, "E"], num_blocks: int, block: int, *, empty: bool
) -> TileList:
    """The live tiles of one buffer of `num_blocks` blocks, in which expert e has `counts_E[e]` rows from row
    `starts_E[e]` on, a multiple of `block`. `block` in the list counts from the start of the buffer.

    Experts come in order; within one the partly filled block comes first. If `empty`, one tile for each expert without
    rows follows the live tiles; it stands for no rows. If not, the last live tile is repeated, so that two cores can
    halve an odd list. In a list of one tile the second core gets another, dead block instead, because both cores
    writing the same tile would race.
    """
    num_experts = counts_E.shape[0]
    starts_E, counts_E = starts_E.astype(jnp.int32), counts_E.astype(jnp.int32)
    blocks_E = -(-counts_E // block)
    ends_E = jnp.cumsum(blocks_E)
    num_live, num_empty = ends_E[-1], (counts_E == 0).sum(dtype=jnp.int32)
    place = jnp.arange(num_blocks + 1 + empty * num_experts, dtype=jnp.int32)
    live = place < num_live
    source = jnp.clip(place, 0, jnp.maximum(num_live - 1, 0))
    source_expert = jnp.minimum((source[:, None] >= ends_E[None]).sum(1, dtype=jnp.int32), num_experts - 1)
    in_expert = jnp.maximum(ends_E[source_expert] - 1 - source, 0)
    source_block = starts_E[source_expert] // block + in_expert
    rows = jnp.clip(counts_E[source_expert] - in_expert * block, 0, block)
    opens, closes = in_expert + 1 == blocks_E[source_expert], in_expert == 0
    expert, at = source_expert, source_block
    if empty:
        order_E = jnp.argsort(counts_E > 0, stable=True).astype(jnp.int32)
        expert = jnp.where(live, expert, order_E[jnp.clip(place - num_live, 0, num_experts - 1)])
        rows, opens, closes = jnp.where(live, rows, 0), opens | ~live, closes | ~live
    else:
        alone = ~live & (num_live <= 1) & (place > 0)
        at, rows = jnp.where(alone, (at + 1) % num_blocks, at), jnp.where(alone, 0, rows)
    return TileList(
        expert=expert,
        block=at,
        source_expert=source_expert,
        source_block=source_block,
        rows=rows,
        opens=opens.astype(jnp.int32),
        closes=closes.astype(jnp.int32),
        num_live=num_live,
        num_touched=num_live + num_empty,
    )

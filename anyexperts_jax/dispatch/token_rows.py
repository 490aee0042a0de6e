"""Which rows a device sends where: one for each token and each device that holds some of its experts.

W counts the devices that the experts are split over. Device w holds the experts w * E / W to (w + 1) * E / W - 1.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.dispatch.base import buffer_row_map, sort_slots
from anyexperts_jax.dispatch.exchange_sizes import BufferSizes
from anyexperts_jax.ops.row_map import RowMap, take_rows
from anyexperts_jax.ops.slot_order import SlotOrder


class TokenRows(NamedTuple):
    """The rows of a device's tokens, sorted by (device, position, sequence)."""

    devices_NK: Int[Array, "N K"]  # of each slot; W: the slot is empty
    rows_NK: Int[Array, "N K"]  # the same in the first slot of each token and device, W in all others
    order: SlotOrder  # of `rows_NK`: what it calls experts are devices, and its slots are rows
    slots_before_R: Int[Array, "R+1"]  # slots of all rows before each place of the order

    def fitting(self, sizes: BufferSizes, first_W: Int[Array, "W"]) -> Int[Array, "W"]:
        """How many rows from number `first_W` on fit in a buffer to each device: at least one, if there is one."""
        begin_W, end_W = self.order.starts_E + first_W, self.order.starts_E + self.order.counts_E
        most_W = self.slots_before_R[begin_W] + sizes.slots
        within_W = jnp.searchsorted(self.slots_before_R[1:], most_W, side="right").astype(jnp.int32)
        return jnp.minimum(jnp.minimum(within_W, end_W) - begin_W, sizes.rows)

    def slots_of(self, rows_W: Int[Array, "W"]) -> Int[Array, "W"]:
        """The slots of the first `rows_W` rows to each device."""
        begin_W = self.order.starts_E
        return self.slots_before_R[begin_W + rows_W] - self.slots_before_R[begin_W]


def find_token_rows(
    expert_ids_NK: Int[Array, "N K"], local_experts: int, num_devices: int, num_sequences: int
) -> TokenRows:
    """The rows that these slots need; an empty slot has the id E = local_experts * num_devices."""
    devices_NK = expert_ids_NK // local_experts
    same_NKK = devices_NK[:, :, None] == devices_NK[:, None, :]
    rows_NK = jnp.where(jnp.tril(same_NKK, -1).any(-1), num_devices, devices_NK)
    order = sort_slots(rows_NK, num_devices, num_sequences)
    slots_NK = jnp.where(rows_NK < num_devices, same_NKK.sum(-1, dtype=jnp.int32), 0)
    ends_R = jnp.cumsum(slots_NK.reshape(-1)[order.slots_R], dtype=jnp.int32)
    return TokenRows(devices_NK, rows_NK, order, jnp.concatenate([jnp.zeros(1, jnp.int32), ends_R]))


def map_buffers(rows: TokenRows, sizes: BufferSizes, first_W: Int[Array, "W"]) -> RowMap:
    """The map between tokens and the rows of all buffers, W * sizes.rows: row number `first_W` to each device, and
    after it what fits. What it calls a slot of a token is the token's row to a device."""
    return buffer_row_map(rows.order, rows.rows_NK, sizes.rows, (first_W, rows.fitting(sizes, first_W)))


def slots_of_rows(
    rows: TokenRows, row_map: RowMap, expert_ids_NK: Int[Array, "N K"], weights_NK: Float[Array, "N K"]
) -> tuple[Int[Array, "R K"], Float[Array, "R K"]]:
    """(global ids, weights) of the slots that travel with each row. A slot for another device becomes -1 with weight 0.
    Differentiable in the weights."""
    num_devices = rows.order.counts_E.size
    device_R = jnp.arange(row_map.live_R.size, dtype=jnp.int32) // (row_map.live_R.size // num_devices)
    own_RK = row_map.live_R[:, None] & (rows.devices_NK[row_map.tokens_R] == device_R[:, None])
    ids_RK = jnp.where(own_RK, expert_ids_NK[row_map.tokens_R], -1)
    return ids_RK, jnp.where(own_RK, take_rows(weights_NK, row_map), 0)

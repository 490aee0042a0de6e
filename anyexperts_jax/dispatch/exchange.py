"""Experts on many shards: each slot's row travels to the shard that holds its expert, and back.

What one shard does, with its own tokens and its own experts, among the shards of a named axis. Rows go in buffers of
one size for every pair of shards, sized by the budget. What does not fit is dropped and counted, latest positions
first, or goes in further rounds of the same exchange, which take time only where some shard needs them.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.remat import EXCHANGED
from anyexperts_jax.dispatch.base import DispatchStats, buffer_row_map, sort_slots
from anyexperts_jax.ops.routed_mlp import routed_mlp
from anyexperts_jax.ops.row_map import combine_rows, take_rows
from anyexperts_jax.routing.plan import PlanSpec

Experts = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


def rows_per_shard(spec: PlanSpec, num_tokens: int, shards: int) -> int:
    """Rows a shard of `num_tokens` tokens can send to one other: capacity_factor times its share of the budget's real
    slots, at least 1 and at most all the slots that its tokens can have there."""
    share = spec.expected_real_slots * num_tokens / shards
    return min(num_tokens * (spec.num_experts // shards), max(1, math.ceil(spec.capacity_factor * share)))


def apply_exchange(
    x_ND: Float[Array, "N D"],
    expert_ids_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    spec: PlanSpec,
    experts: Experts,
    *,
    axis: str,
    num_sequences: int,
    implementation: str | None,
    residuals: str,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(weighted sum of each token's experts in float32, stats of this shard). Call it inside a `shard_map`.

    Args:
      x_ND, expert_ids_NK, weights_NK: this shard's tokens; ids count the experts of all shards.
      experts: this shard's weights, E / shards experts that follow those of the shard before.
      axis: the mesh axis the experts are split over.
    """
    shards = lax.axis_size(axis)
    own_experts = spec.num_experts // shards
    rows = rows_per_shard(spec, x_ND.shape[0], shards)
    shard_NK = expert_ids_NK // own_experts  # `shards` where a slot is empty
    order = sort_slots(shard_NK, shards, num_sequences)
    first_expert = lax.axis_index(axis) * own_experts

    def exchange(first: Int[Array, ""] | int) -> Float[Array, "N D"]:
        row_map = buffer_row_map(order, shard_NK, rows, first)
        ids_R = jnp.where(row_map.live_R, expert_ids_NK.reshape(-1)[row_map.slots_R], spec.num_experts)
        received_RD = checkpoint_name(_swap(take_rows(x_ND, row_map), axis), EXCHANGED)
        received_ids_R = checkpoint_name(_swap(ids_R, axis), EXCHANGED)
        y_RD = _own_experts(received_RD, received_ids_R - first_expert, experts, implementation, residuals)
        returned_RD = checkpoint_name(_swap(y_RD.astype(x_ND.dtype), axis), EXCHANGED)
        return combine_rows(returned_RD, weights_NK, row_map)

    y_ND, dropped = exchange(0), jnp.maximum(order.counts_E - rows, 0).sum()
    most_slots = x_ND.shape[0] * min(shard_NK.shape[1], own_experts)
    if spec.overflow == "fallback" and most_slots > rows:
        most_here = lax.pmax(order.counts_E.max(), axis)
        further = jax.checkpoint(exchange)  # rounds without rows must not cost memory

        def add_round(y_ND: Array, first: Array) -> tuple[Array, None]:
            return lax.cond(first < most_here, lambda: y_ND + further(first), lambda: y_ND), None

        y_ND, _ = lax.scan(add_round, y_ND, jnp.arange(rows, most_slots, rows))
        dropped = jnp.zeros_like(dropped)
    return y_ND, DispatchStats(dropped=dropped, rows=order.counts_E.sum() - dropped)


def _swap(a: Array, axis: str) -> Array:
    """Row block i goes to shard i; block i of the result came from there."""
    blocks = a.reshape(lax.axis_size(axis), -1, *a.shape[1:])
    return lax.all_to_all(blocks, axis, split_axis=0, concat_axis=0, tiled=True).reshape(a.shape)


def _own_experts(
    x_RD: Float[Array, "R D"], ids_R: Int[Array, "R"], experts: Experts, implementation: str | None, residuals: str
) -> Float[Array, "R D"]:
    """Each row through its expert, zero where the id is none of ours."""
    num_experts = experts[0].shape[0]
    ids_R1 = jnp.where((ids_R >= 0) & (ids_R < num_experts), ids_R, num_experts)[:, None].astype(jnp.int32)
    ones_R1 = jnp.ones(ids_R1.shape, jnp.float32)
    return routed_mlp(x_RD, ones_R1, sort_slots(ids_R1, num_experts), *experts, implementation, residuals=residuals)

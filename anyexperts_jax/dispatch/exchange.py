"""Expert parallelism: the row of each real slot is sent to the device that holds its expert, and back, by all-to-all.

An all-to-all needs equal shapes, so every pair of devices along the expert axis exchanges a buffer of the same size,
given by the budget. Slots that do not fit are dropped and counted, latest positions first, or sent in further rounds of
the same exchange. A round takes time only if some device needs it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.remat import EXCHANGED
from anyexperts_jax.dispatch.base import DispatchStats, buffer_row_map, sort_slots
from anyexperts_jax.dispatch.blocks import dispatch_blocks
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.dispatch.local_tokens import map_local_tokens, token_axes
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import routed_mlp
from anyexperts_jax.ops.row_map import combine_rows, take_rows
from anyexperts_jax.routing.plan import PlanSpec, RoutingPlan
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import parts


class LocalTokens(NamedTuple):
    """The tokens of one device. Expert ids are global: they count the experts of all devices."""

    x_ND: Float[Array, "N D"]
    expert_ids_NK: Int[Array, "N K"]
    weights_NK: Float[Array, "N K"]
    num_sequences: int


def rows_per_shard(spec: PlanSpec, capacity_factor: float, num_tokens: int, shards: int) -> int:
    """Rows that a shard of `num_tokens` tokens can send to each shard: capacity_factor times the share of the budget's
    real slots, at least 1 and at most the number of slots that its tokens can have there."""
    share = spec.expected_real_slots * num_tokens / shards
    return min(num_tokens * (spec.num_experts // shards), max(1, math.ceil(capacity_factor * share)))


def dispatch_exchange(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """A `dispatch.base.Dispatcher` for meshes whose `expert` axis splits the experts. Stats are summed over all
    devices.

    Tokens stay on their device. The row of each real slot goes to the device that holds its expert, through the expert,
    and back. If the FFN width is split over devices, each has a partial sum, and these are added once per token. Every
    device holds whole rows of x; weights that are split over `fsdp` are gathered first. If the axis has one device,
    this is `blocks`: nothing is sent and nothing is dropped.

    Raises:
      UserError: without a placement, and for experts, widths, sequences or positions that the mesh or
        `exchange_chunks` does not divide.
    """
    if placement is None:
        message = "dispatch='exchange' needs a mesh: pass placement=Placement(mesh), or use dispatch='blocks'"
        require(False, message)
        raise AssertionError(message)  # for type checkers
    axis = placement.rules.expert
    require(isinstance(axis, str), f"dispatch='exchange' needs one mesh axis of experts and has {axis!r}")
    if placement.mesh.shape[axis] == 1:
        return dispatch_blocks(x_ND, plan, experts, execution, placement)
    _check(plan.spec, x_ND.shape[0], execution, placement)
    width_axis, every_axis = placement.rules.expert_mlp, placement.mesh.axis_names
    chunks = execution.exchange_chunks

    def run(x_BTD: Array, ids_BTK: Array, weights_BTK: Array, experts: ExpertWeights) -> tuple[Array, DispatchStats]:
        # The chunks do not depend on each other, so the compiler can overlap one chunk's all-to-all with the matmuls of
        # another.
        pieces = zip(*(jnp.split(a, chunks, axis=1) for a in (x_BTD, ids_BTK, weights_BTK)), strict=True)
        done = []
        for piece in pieces:
            local = LocalTokens(*(a.reshape(-1, a.shape[-1]) for a in piece), num_sequences=x_BTD.shape[0])
            y_ND, stats = exchange_slots(local, plan.spec, experts, execution, (str(axis), every_axis))
            done.append((y_ND.reshape(piece[0].shape), stats))
        y_BTD = jnp.concatenate([y_BtD for y_BtD, _ in done], axis=1)
        if width_axis is not None:  # after combine and the way back: one row per token to sum, instead of one per slot
            y_BTD = lax.psum(y_BTD, width_axis)
        total = lambda *counts: lax.psum(sum(counts), token_axes(placement))  # noqa: E731
        return y_BTD, jax.tree.map(total, *(stats for _, stats in done))

    return map_local_tokens(run, x_ND, plan, experts, placement, expert_axis=str(axis))


def exchange_slots(
    local: LocalTokens,
    spec: PlanSpec,
    experts: ExpertWeights,
    execution: Execution,
    axes: tuple[str, tuple[str, ...]],
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(weighted sum of each token's experts in float32, stats of this device). To be called inside a `shard_map`.

    Args:
      experts: this device's E / shards experts, a contiguous range of the global ids.
      axes: the mesh axis that splits the experts, and all axes of the mesh.
    """
    axis, every_axis = axes
    shards = lax.axis_size(axis)
    local_experts, num_tokens = spec.num_experts // shards, local.x_ND.shape[0]
    rows = rows_per_shard(spec, execution.capacity_factor, num_tokens, shards)
    # Slots are sorted by device, not by expert: the sender only needs to know the buffer, and the receiver sorts the
    # rows of all senders by expert once. An empty slot has the id E, which becomes the shard number `shards`.
    shard_NK = local.expert_ids_NK // local_experts
    order = sort_slots(shard_NK, shards, local.num_sequences)
    first_expert = lax.axis_index(axis) * local_experts

    def exchange(first: Int[Array, ""] | int) -> Float[Array, "N D"]:
        """Sends the slots from number `first` on that fit in each shard's buffer, and combines what comes back."""
        row_map = buffer_row_map(order, shard_NK, rows, first)
        # Rows of a buffer that is not full carry the id E, so that the receiver skips them.
        ids_R = jnp.where(row_map.live_R, local.expert_ids_NK.reshape(-1)[row_map.slots_R], spec.num_experts)
        # The names let remat="exchanged" save what was received: otherwise the backward pass repeats every all-to-all.
        received_RD = checkpoint_name(_swap(take_rows(local.x_ND, row_map), axis), EXCHANGED)
        received_ids_R = checkpoint_name(_swap(ids_R, axis), EXCHANGED)
        y_RD = _local_experts(received_RD, received_ids_R - first_expert, experts, execution)
        # Results return in x's dtype, half the traffic of float32 for bfloat16; combine accumulates in float32 again.
        returned_RD = checkpoint_name(_swap(y_RD.astype(local.x_ND.dtype), axis), EXCHANGED)
        # `_swap` is its own inverse, so a row comes back to the place it was sent from and the same map combines it.
        return combine_rows(returned_RD, local.weights_NK, row_map)

    y_ND, dropped = exchange(0), jnp.maximum(order.counts_E - rows, 0).sum(dtype=jnp.int32)
    most_slots = num_tokens * min(shard_NK.shape[1], local_experts)  # that one shard can get: experts are distinct
    if execution.overflow == "fallback" and most_slots > rows:
        # All devices of the mesh must take a round, or none: a device that skips an all-to-all, or a reduction that the
        # compiler places in the round's backward pass, leaves the others waiting forever. So the predicate is reduced
        # over all axes of the mesh, not only over the expert axis.
        most_anywhere = lax.pmax(order.counts_E.max(), every_axis)
        further = jax.checkpoint(exchange)  # otherwise a scan stores residuals of every round, even of skipped ones

        def add_round(y_ND: Array, first: Array) -> tuple[Array, None]:
            return lax.cond(first < most_anywhere, lambda: y_ND + further(first), lambda: y_ND), None

        y_ND, _ = lax.scan(add_round, y_ND, jnp.arange(rows, most_slots, rows, dtype=jnp.int32))
        dropped = jnp.zeros_like(dropped)
    return y_ND, DispatchStats(dropped=dropped, rows=order.counts_E.sum(dtype=jnp.int32) - dropped)


def _swap(a: Array, axis: str) -> Array:
    """All-to-all along `axis`: sends block i of the rows to shard i; block i of the result came from shard i."""
    blocks = a.reshape(lax.axis_size(axis), -1, *a.shape[1:])
    return lax.all_to_all(blocks, axis, split_axis=0, concat_axis=0, tiled=True).reshape(a.shape)


def _local_experts(
    x_RD: Float[Array, "R D"], ids_R: Int[Array, "R"], experts: ExpertWeights, execution: Execution
) -> Float[Array, "R D"]:
    """Applies its expert to each row; zero for ids outside this device's range.

    Each row is a token with one slot of weight 1: the combine weights stay with the sender.
    """
    num_experts = experts.gate_EDF.shape[0]
    ids_R1 = jnp.where((ids_R >= 0) & (ids_R < num_experts), ids_R, num_experts)[:, None].astype(jnp.int32)
    ones_R1 = jnp.ones(ids_R1.shape, jnp.float32)
    return routed_mlp(x_RD, ones_R1, sort_slots(ids_R1, num_experts), experts, **execution.op_options)


def _check(spec: PlanSpec, num_tokens: int, execution: Execution, placement: Placement) -> None:
    mesh, rules = placement.mesh, placement.rules
    axis, chunks = str(rules.expert), execution.exchange_chunks
    shards, positions = mesh.shape[axis], num_tokens // spec.num_sequences
    require(
        spec.num_experts % shards == 0, f"{spec.num_experts} experts do not split over mesh axis {axis!r} of {shards}"
    )
    local = positions // parts(mesh, rules.length)
    require(local % chunks == 0, f"exchange_chunks={chunks} must divide the {local} positions that a device has")

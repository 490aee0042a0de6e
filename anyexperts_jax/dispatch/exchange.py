"""Experts on many devices: each real slot's row travels to the device that holds its expert, and back.

Rows go in buffers of one size for every pair of devices along the expert axis, sized by the budget. What does not fit
is dropped and counted, latest positions first, or goes in further rounds of the same exchange, which take time only
where some device needs them.
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
from anyexperts_jax.dispatch.own_tokens import on_own_tokens, token_axes
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import routed_mlp
from anyexperts_jax.ops.row_map import combine_rows, take_rows
from anyexperts_jax.routing.plan import PlanSpec, RoutingPlan
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import parts


class OwnTokens(NamedTuple):
    """What one device has of the tokens; expert ids count the experts of all devices."""

    x_ND: Float[Array, "N D"]
    expert_ids_NK: Int[Array, "N K"]
    weights_NK: Float[Array, "N K"]
    num_sequences: int


def rows_per_shard(spec: PlanSpec, capacity_factor: float, num_tokens: int, shards: int) -> int:
    """Rows a shard of `num_tokens` tokens can send to one other: capacity_factor times its share of the budget's real
    slots, at least 1 and at most all the slots that its tokens can have there."""
    share = spec.expected_real_slots * num_tokens / shards
    return min(num_tokens * (spec.num_experts // shards), max(1, math.ceil(capacity_factor * share)))


def dispatch_exchange(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """A `dispatch.base.Dispatcher` for meshes whose `expert` axis splits the experts; stats of all devices in sum.

    Tokens stay with the device that has them; a real slot's row goes to the device that holds its expert, through its
    kernels, and back. FFN widths split over devices give partial sums that are added once per token. Every device
    holds whole rows of x; weights split over `fsdp` are gathered first. Where the axis has one device nothing travels
    and nothing is dropped: that is `blocks`.

    Raises:
      UserError: no placement, or experts, widths, sequences or positions that the mesh or `exchange_chunks` does not
        divide.
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
        pieces = zip(*(jnp.split(a, chunks, axis=1) for a in (x_BTD, ids_BTK, weights_BTK)), strict=True)
        done = []
        for piece in pieces:
            own = OwnTokens(*(a.reshape(-1, a.shape[-1]) for a in piece), num_sequences=x_BTD.shape[0])
            y_ND, stats = exchange_slots(own, plan.spec, experts, execution, (str(axis), every_axis))
            done.append((y_ND.reshape(piece[0].shape), stats))
        y_BTD = jnp.concatenate([y_BtD for y_BtD, _ in done], axis=1)
        if width_axis is not None:
            y_BTD = lax.psum(y_BTD, width_axis)
        total = lambda *counts: lax.psum(sum(counts), token_axes(placement))  # noqa: E731
        return y_BTD, jax.tree.map(total, *(stats for _, stats in done))

    return on_own_tokens(run, x_ND, plan, experts, placement, expert_axis=str(axis))


def exchange_slots(
    own: OwnTokens,
    spec: PlanSpec,
    experts: ExpertWeights,
    execution: Execution,
    axes: tuple[str, tuple[str, ...]],
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(weighted sum of each token's experts in float32, stats of this device). Call it inside a `shard_map`.

    Args:
      experts: this device's weights, E / shards experts that follow those of the device before.
      axes: the mesh axis the experts are split over, and all axes of the mesh.
    """
    axis, every_axis = axes
    shards = lax.axis_size(axis)
    own_experts, num_tokens = spec.num_experts // shards, own.x_ND.shape[0]
    rows = rows_per_shard(spec, execution.capacity_factor, num_tokens, shards)
    shard_NK = own.expert_ids_NK // own_experts  # `shards` where a slot is empty
    order = sort_slots(shard_NK, shards, own.num_sequences)
    first_expert = lax.axis_index(axis) * own_experts

    def exchange(first: Int[Array, ""] | int) -> Float[Array, "N D"]:
        """The slots from the `first` on that each shard's buffer holds, there and back."""
        row_map = buffer_row_map(order, shard_NK, rows, first)
        ids_R = jnp.where(row_map.live_R, own.expert_ids_NK.reshape(-1)[row_map.slots_R], spec.num_experts)
        received_RD = checkpoint_name(_swap(take_rows(own.x_ND, row_map), axis), EXCHANGED)
        received_ids_R = checkpoint_name(_swap(ids_R, axis), EXCHANGED)
        y_RD = _own_experts(received_RD, received_ids_R - first_expert, experts, execution)
        returned_RD = checkpoint_name(_swap(y_RD.astype(own.x_ND.dtype), axis), EXCHANGED)
        return combine_rows(returned_RD, own.weights_NK, row_map)

    y_ND, dropped = exchange(0), jnp.maximum(order.counts_E - rows, 0).sum(dtype=jnp.int32)
    most_slots = num_tokens * min(shard_NK.shape[1], own_experts)
    if execution.overflow == "fallback" and most_slots > rows:
        # A round is entered by all devices of the mesh or by none: one that skipped an all-to-all, or a reduction that
        # the compiler puts into its backward pass, would leave the others waiting.
        most_anywhere = lax.pmax(order.counts_E.max(), every_axis)
        further = jax.checkpoint(exchange)  # rounds without rows must not cost memory

        def add_round(y_ND: Array, first: Array) -> tuple[Array, None]:
            return lax.cond(first < most_anywhere, lambda: y_ND + further(first), lambda: y_ND), None

        y_ND, _ = lax.scan(add_round, y_ND, jnp.arange(rows, most_slots, rows, dtype=jnp.int32))
        dropped = jnp.zeros_like(dropped)
    return y_ND, DispatchStats(dropped=dropped, rows=order.counts_E.sum(dtype=jnp.int32) - dropped)


def _swap(a: Array, axis: str) -> Array:
    """Row block i goes to shard i; block i of the result came from there."""
    blocks = a.reshape(lax.axis_size(axis), -1, *a.shape[1:])
    return lax.all_to_all(blocks, axis, split_axis=0, concat_axis=0, tiled=True).reshape(a.shape)


def _own_experts(
    x_RD: Float[Array, "R D"], ids_R: Int[Array, "R"], experts: ExpertWeights, execution: Execution
) -> Float[Array, "R D"]:
    """Each row through its expert, zero where the id is none of ours."""
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
    own = positions // parts(mesh, rules.length)
    require(own % chunks == 0, f"exchange_chunks={chunks} must divide the {own} positions that a device has")

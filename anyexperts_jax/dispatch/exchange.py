"""Expert parallelism: tokens go to the devices that hold their experts, and back, by all-to-all.

A token's row travels once to each device that holds some of its experts, with the ids and combine weights of those. The
device sums its experts' weighted outputs in float32, and one row returns; so do the gradients, one row each way. An
all-to-all needs equal shapes, so every pair of devices along the expert axis exchanges a buffer of the same size, given
by the budget (`exchange_sizes`). Rows that do not fit are dropped with all their slots, latest positions first, or sent
in further rounds of the same exchange. A round takes time only if some device needs it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.remat import EXCHANGED
from anyexperts_jax.dispatch.base import DispatchStats, sort_slots
from anyexperts_jax.dispatch.blocks import dispatch_blocks
from anyexperts_jax.dispatch.exchange_sizes import BufferSizes, buffer_sizes
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.dispatch.local_tokens import map_local_tokens, token_axes
from anyexperts_jax.dispatch.token_rows import TokenRows, find_token_rows, map_buffers, slots_of_rows
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import routed_mlp
from anyexperts_jax.ops.row_map import add_rows, take_rows
from anyexperts_jax.routing.plan import PlanSpec, RoutingPlan
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import parts


class LocalTokens(NamedTuple):
    """The tokens of one device. Expert ids are global: they count the experts of all devices."""

    x_ND: Float[Array, "N D"]
    expert_ids_NK: Int[Array, "N K"]
    weights_NK: Float[Array, "N K"]
    num_sequences: int


def dispatch_exchange(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """A `dispatch.base.Dispatcher` for meshes whose `expert` axis splits the experts. Stats are summed over all
    devices.

    Tokens stay on their device. A row of each token goes to the devices that hold its experts and returns as one sum of
    their outputs. If the FFN width is split over devices, each has a partial sum, added once per token. Every device
    holds whole rows of x; weights that are split over `fsdp` are gathered first. If the axis has one device, this is
    `blocks`: nothing is sent and nothing is dropped.

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
        if width_axis is not None:  # after the way back: one row per token to sum, instead of one per token and device
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
    num_devices, (num_tokens, slots_bound) = lax.axis_size(axis), local.expert_ids_NK.shape
    local_experts = spec.num_experts // num_devices
    sizes = buffer_sizes(spec, execution.capacity_factor, num_tokens, num_devices, slots_bound)
    rows = find_token_rows(local.expert_ids_NK, local_experts, num_devices, local.num_sequences)
    first_expert = lax.axis_index(axis) * local_experts

    def exchange(first_W: Int[Array, "W"]) -> Float[Array, "N D"]:
        """Sends the rows from number `first_W` to each device on that fit in its buffer, and adds what comes back."""
        row_map = map_buffers(rows, sizes, first_W)
        ids_RK, weights_RK = slots_of_rows(rows, row_map, local.expert_ids_NK, local.weights_NK)
        # The names let remat="exchanged" save what was received: otherwise the backward pass repeats the way there.
        received_RD, received_ids_RK, received_weights_RK = (
            checkpoint_name(swap(a, axis), EXCHANGED)
            for swap, a in ((_swap, take_rows(local.x_ND, row_map)), (_swap_slots, ids_RK), (_swap_slots, weights_RK))
        )
        ids_RK = jnp.where(received_ids_RK < 0, local_experts, received_ids_RK - first_expert)
        order = sort_slots(ids_RK, local_experts, most_real=num_devices * sizes.slots)
        y_RD = routed_mlp(received_RD, received_weights_RK, order, experts, **execution.op_options)
        # Results return in x's dtype, half the traffic of float32 for bfloat16; they are added in float32 again.
        # `_swap` is its own inverse, so a row comes back to the place it was sent from and the same map adds it.
        return add_rows(_swap(y_RD.astype(local.x_ND.dtype), axis), row_map)

    first_by_round = _first_rows(rows, sizes, _most_rounds(sizes, num_tokens, slots_bound))
    y_ND = exchange(first_by_round[0])
    slots = rows.slots_of(rows.order.counts_E).sum(dtype=jnp.int32)
    dropped = slots - rows.slots_of(rows.fitting(sizes, first_by_round[0])).sum(dtype=jnp.int32)
    if execution.overflow == "fallback" and len(first_by_round) > 1:
        # All devices of the mesh must take a round, or none: a device that skips an all-to-all, or a reduction that the
        # compiler places in the round's backward pass, leaves the others waiting forever. So the predicate is reduced
        # over all axes of the mesh, not only over the expert axis.
        needed = (first_by_round < rows.order.counts_E[None]).any(-1).sum(dtype=jnp.int32)
        needed_anywhere = lax.pmax(needed, every_axis)
        further = jax.checkpoint(exchange)  # otherwise a scan stores residuals of every round, even of skipped ones

        def add_round(y_ND: Array, numbered: tuple[Array, Array]) -> tuple[Array, None]:
            number, first_W = numbered
            return lax.cond(number < needed_anywhere, lambda: y_ND + further(first_W), lambda: y_ND), None

        numbers = jnp.arange(1, len(first_by_round), dtype=jnp.int32)
        y_ND, _ = lax.scan(add_round, y_ND, (numbers, first_by_round[1:]))
        dropped = jnp.zeros_like(dropped)
    return y_ND, DispatchStats(dropped=dropped, rows=slots - dropped)


def _most_rounds(sizes: BufferSizes, num_tokens: int, slots_bound: int) -> int:
    """The rounds after which every row has been sent, whatever their slots."""
    return -(-num_tokens // min(sizes.rows, sizes.slots // slots_bound))


def _first_rows(rows: TokenRows, sizes: BufferSizes, rounds: int) -> Int[Array, "rounds W"]:
    """The number of the first row to each device in each round."""

    def add(first_W: Array, _: None) -> tuple[Array, Array]:
        return first_W + rows.fitting(sizes, first_W), first_W

    return lax.scan(add, jnp.zeros_like(rows.order.counts_E), None, length=rounds)[1]


def _swap(a: Array, axis: str) -> Array:
    """All-to-all along `axis`: sends block i of the rows to shard i; block i of the result came from shard i."""
    blocks = a.reshape(lax.axis_size(axis), -1, *a.shape[1:])
    return lax.all_to_all(blocks, axis, split_axis=0, concat_axis=0, tiled=True).reshape(a.shape)


def _swap_slots(a_RK: Array, axis: str) -> Array:
    """`_swap` with rows along the last axis: a TPU would fill up K columns to 128."""
    num_devices = lax.axis_size(axis)
    a_WKR = a_RK.reshape(num_devices, -1, a_RK.shape[1]).swapaxes(1, 2)
    swapped_WKR = lax.all_to_all(a_WKR, axis, split_axis=0, concat_axis=0, tiled=True)
    return swapped_WKR.swapaxes(1, 2).reshape(a_RK.shape)


def _check(spec: PlanSpec, num_tokens: int, execution: Execution, placement: Placement) -> None:
    mesh, rules = placement.mesh, placement.rules
    axis, chunks = str(rules.expert), execution.exchange_chunks
    shards, positions = mesh.shape[axis], num_tokens // spec.num_sequences
    require(
        spec.num_experts % shards == 0, f"{spec.num_experts} experts do not split over mesh axis {axis!r} of {shards}"
    )
    local = positions // parts(mesh, rules.length)
    require(local % chunks == 0, f"exchange_chunks={chunks} must divide the {local} positions that a device has")

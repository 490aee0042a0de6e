"""Dispatch into buffers of C rows per expert, [E, C, D]: static shapes that XLA can partition. Overflow is dropped and
counted, or computed exactly."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.arrays import vary_tree_alike
from anyexperts_jax.dispatch.base import DispatchStats, buffer_row_map, sort_slots
from anyexperts_jax.dispatch.blocks import dispatch_blocks
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.ops.expert_mlp import expert_mlp
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.row_map import combine_rows, take_rows
from anyexperts_jax.routing.plan import PlanSpec, RoutingPlan
from anyexperts_jax.sharding.activations import split_buffers
from anyexperts_jax.sharding.placement import Placement


def rows_per_expert(spec: PlanSpec, capacity_factor: float, num_tokens: int) -> int:
    """C = capacity_factor times an expert's share of the budget's real slots, at least 1 and at most N."""
    share = spec.expected_real_slots * num_tokens / spec.num_experts
    return min(num_tokens, max(1, math.ceil(capacity_factor * share)))


def dispatch_capacity(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """A `dispatch.base.Dispatcher`. Slots beyond an expert's capacity are dropped, or the layer falls back to `blocks`.

    On a mesh the buffers are split like the experts, and XLA moves the rows.
    """
    capacity = rows_per_expert(plan.spec, execution.capacity_factor, x_ND.shape[0])
    y_ND, stats = _through_buffers(x_ND, plan, experts, (capacity, execution), placement)
    if execution.overflow == "drop":
        return y_ND, stats

    # Rematerialised: a `cond` allocates the residuals of both branches, and the exact one is rarely taken.
    exact = jax.checkpoint(lambda x_ND, plan, experts: dispatch_blocks(x_ND, plan, experts, execution, placement))
    through_buffers = vary_tree_alike((y_ND, stats), x_ND)
    return jax.lax.cond(
        stats.dropped > 0, lambda: vary_tree_alike(exact(x_ND, plan, experts), x_ND), lambda: through_buffers
    )


def _through_buffers(
    x_ND: Array,
    plan: RoutingPlan,
    experts: ExpertWeights,
    sized: tuple[int, Execution],
    placement: Placement | None,
) -> tuple[Array, DispatchStats]:
    (capacity, execution), num_experts = sized, plan.spec.num_experts
    order = sort_slots(plan.expert_ids_NK, num_experts, plan.spec.num_sequences)
    row_map = buffer_row_map(order, plan.expert_ids_NK, capacity)
    x_ECD = split_buffers(take_rows(x_ND, row_map).reshape(num_experts, capacity, x_ND.shape[1]), placement)
    kept_E = jnp.minimum(order.counts_E, capacity)
    y_ECD = split_buffers(expert_mlp(x_ECD, kept_E, *experts, **execution.op_options), placement)
    y_ND = combine_rows(y_ECD.reshape(-1, x_ND.shape[1]), plan.weights_NK, row_map)
    rows = jnp.asarray(num_experts * capacity, jnp.int32)
    return y_ND, DispatchStats(dropped=(order.counts_E - kept_E).sum(dtype=jnp.int32), rows=rows)

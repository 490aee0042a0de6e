"""Buffers of C rows an expert, [E, C, D]: static shapes, which shard. Overflow is dropped and counted."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.dispatch.base import DispatchStats, buffer_row_map, sort_slots
from anyexperts_jax.ops.expert_mlp import expert_mlp
from anyexperts_jax.ops.row_map import combine_rows, take_rows
from anyexperts_jax.routing.plan import PlanSpec, RoutingPlan


def rows_per_expert(spec: PlanSpec, num_tokens: int) -> int:
    """C: capacity_factor times an expert's share of the budget's real slots, at least 1 and at most N."""
    share = spec.expected_real_slots * num_tokens / spec.num_experts
    return min(num_tokens, max(1, math.ceil(spec.capacity_factor * share)))


def apply_capacity(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    capacity: int,
    num_sequences: int,
    implementation: str | None,
    residuals: str,
    place: Callable[[Float[Array, "E C D"]], Float[Array, "E C D"]] = lambda x_ECD: x_ECD,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(weighted sum of each token's experts in float32, stats); an expert's slots past `capacity` add nothing.

    Args:
      place: puts the experts' inputs and outputs where they are to live.
    """
    num_experts = plan.spec.num_experts
    order = sort_slots(plan.expert_ids_NK, num_experts, num_sequences)
    row_map = buffer_row_map(order, plan.expert_ids_NK, capacity)
    x_ECD = place(take_rows(x_ND, row_map).reshape(num_experts, capacity, x_ND.shape[1]))
    kept_E = jnp.minimum(order.counts_E, capacity)
    y_ECD = place(expert_mlp(x_ECD, kept_E, w_gate_EDF, w_up_EDF, w_down_EFD, implementation, residuals=residuals))
    y_ND = combine_rows(y_ECD.reshape(-1, x_ND.shape[1]), plan.weights_NK, row_map)
    rows = jnp.asarray(num_experts * capacity, jnp.int32)
    return y_ND, DispatchStats(dropped=(order.counts_E - kept_E).sum(), rows=rows)

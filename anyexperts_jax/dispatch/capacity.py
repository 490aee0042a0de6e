"""Buffers of C rows an expert, [E, C, D]: static shapes, which shard. Overflow is dropped and counted."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.dispatch.base import DispatchStats, sort_slots
from anyexperts_jax.ops.expert_mlp import expert_mlp
from anyexperts_jax.ops.row_map import RowMap, combine_rows, take_rows
from anyexperts_jax.ops.slot_order import SlotOrder
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
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(weighted sum of each token's experts in float32, stats); an expert's slots past `capacity` add nothing."""
    num_experts = plan.spec.num_experts
    order = sort_slots(plan.expert_ids_NK, num_experts, num_sequences)
    row_map = _row_map(order, plan.expert_ids_NK, capacity)
    x_ECD = take_rows(x_ND, row_map).reshape(num_experts, capacity, x_ND.shape[1])
    kept_E = jnp.minimum(order.counts_E, capacity)
    y_ECD = expert_mlp(x_ECD, kept_E, w_gate_EDF, w_up_EDF, w_down_EFD, implementation, residuals=residuals)
    y_ND = combine_rows(y_ECD.reshape(-1, x_ND.shape[1]), plan.weights_NK, row_map)
    rows = jnp.asarray(num_experts * capacity, jnp.int32)
    return y_ND, DispatchStats(dropped=(order.counts_E - kept_E).sum(), rows=rows)


def _row_map(order: SlotOrder, expert_ids_NK: Array, capacity: int) -> RowMap:
    """Row e * C + c serves the c-th slot of expert e."""
    num_experts, k = order.counts_E.shape[0], expert_ids_NK.shape[1]
    place_in_expert_C = jnp.arange(capacity)
    place_EC = jnp.minimum(order.starts_E[:, None] + place_in_expert_C, order.slots_R.size - 1)
    slots_R = order.slots_R[place_EC.reshape(-1)]
    expert_NK = jnp.minimum(expert_ids_NK, num_experts - 1)
    place_in_expert_NK = order.places_NK - order.starts_E[expert_NK]
    held_NK = (expert_ids_NK < num_experts) & (place_in_expert_NK < capacity)
    return RowMap(
        tokens_R=slots_R // k,
        slots_R=slots_R,
        live_R=(place_in_expert_C < order.counts_E[:, None]).reshape(-1),
        rows_NK=jnp.where(held_NK, expert_NK * capacity + place_in_expert_NK, 0),
        held_NK=held_NK,
    )

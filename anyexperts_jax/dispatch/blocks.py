"""Dropless on one shard: rows lie expert after expert, and the time follows the real slots."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.dispatch.base import DispatchStats, RowMap, combine_rows, sort_slots, take_rows
from anyexperts_jax.ops.grouped_mlp import grouped_mlp
from anyexperts_jax.routing.plan import RoutingPlan


def apply_blocks(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    implementation: str | None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(weighted sum of each token's experts in float32, stats)."""
    order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
    real_slots = order.counts_E.sum()
    row_map = RowMap(
        tokens_R=order.slots_R // plan.expert_ids_NK.shape[1],
        slots_R=order.slots_R,
        live_R=jnp.arange(order.slots_R.size) < real_slots,
        rows_NK=order.places_NK,
        held_NK=plan.expert_ids_NK < plan.spec.num_experts,
    )
    x_RD = take_rows(x_ND, row_map)
    y_RD = grouped_mlp(x_RD, order.counts_E, w_gate_EDF, w_up_EDF, w_down_EFD, implementation)
    y_ND = combine_rows(y_RD, plan.weights_NK, row_map)
    return y_ND, DispatchStats(dropped=jnp.zeros((), jnp.int32), rows=real_slots)

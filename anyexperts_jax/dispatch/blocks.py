"""Dropless on one shard: experts take however many slots they get, and the time follows the real slots."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.dispatch.base import DispatchStats, sort_slots
from anyexperts_jax.ops.routed_mlp import routed_mlp
from anyexperts_jax.routing.plan import RoutingPlan


def apply_blocks(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    implementation: str | None,
    residuals: str,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(weighted sum of each token's experts in float32, stats)."""
    order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
    y_ND = routed_mlp(
        x_ND, plan.weights_NK, order, w_gate_EDF, w_up_EDF, w_down_EFD, implementation, residuals=residuals
    )
    return y_ND, DispatchStats(dropped=jnp.zeros((), jnp.int32), rows=order.counts_E.sum())

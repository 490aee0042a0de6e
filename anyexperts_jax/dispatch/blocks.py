"""Dropless on one shard: experts take however many slots they get, and the time follows the real slots."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    return apply_slots(
        x_ND, plan.expert_ids_NK, plan.weights_NK, *weights, implementation=implementation, residuals=residuals
    )


def apply_slots(
    x_ND: Float[Array, "N D"],
    expert_ids_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    implementation: str | None,
    residuals: str,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """`apply_blocks` of what it needs of a plan, as a shard has it of its own tokens."""
    order = sort_slots(expert_ids_NK, w_gate_EDF.shape[0])
    y_ND = routed_mlp(x_ND, weights_NK, order, w_gate_EDF, w_up_EDF, w_down_EFD, implementation, residuals=residuals)
    return y_ND, DispatchStats(dropped=jnp.zeros((), jnp.int32), rows=order.counts_E.sum())

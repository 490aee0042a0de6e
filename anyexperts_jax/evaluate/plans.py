"""Rebuilds the plan behind a trace, so that dispatch can be run again with the same routing."""

import jax.numpy as jnp

from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.routing.plan import RoutingPlan, plan_spec
from anyexperts_jax.routing.trace import RoutingTrace


def plan_of(model: ModelConfig, trace: RoutingTrace) -> RoutingPlan:
    """Returns the plan behind one layer's trace. The trace has no weights, so every slot gets an equal share."""
    moe = model.moe
    ids_NK = trace.expert_ids_BTK.reshape(-1, trace.expert_ids_BTK.shape[-1])
    slots_N, real_N, virtual_N = (
        leaf.reshape(-1) for leaf in (trace.slots_BT, trace.real_slots_BT, trace.virtual_slots_BT)
    )
    share_N = 1 / jnp.maximum(slots_N, 1).astype(jnp.float32)
    return RoutingPlan(
        expert_ids_NK=ids_NK,
        weights_NK=jnp.where(ids_NK < moe.num_experts, share_N[:, None], 0.0),
        virtual_weight_N=virtual_N.astype(jnp.float32) * share_N,
        importance_N=trace.importance_BT.reshape(-1),
        slots_N=slots_N,
        real_slots_N=real_N,
        virtual_slots_N=virtual_N,
        losses={},
        metrics={},
        spec=plan_spec(moe, num_sequences=trace.slots_BT.shape[0]),
    )

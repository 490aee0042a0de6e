"""`RoutingTrace`: what a layer's routing did, per token and in sum, in the shape of the batch."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.routing.plan import RoutingPlan


@register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingTrace:
    """One MoE layer's routing; stacked over layers every array gains a leading L axis."""

    importance_BT: Float[Array, "*L B T"]
    slots_BT: Int[Array, "*L B T"]
    real_slots_BT: Int[Array, "*L B T"]
    virtual_slots_BT: Int[Array, "*L B T"]
    expert_ids_BTK: Int[Array, "*L B T K"]  # E where the slot holds no real expert
    losses: dict[str, Array]  # as in the plan: "balance", "importance", "z", unweighted
    metrics: dict[str, Array]  # as in the plan, and "dropped": real slots that found no room, float32

    @classmethod
    def from_plan(
        cls, plan: RoutingPlan, num_sequences: int, dropped: Float[Array, ""] | Int[Array, ""] | int = 0
    ) -> "RoutingTrace":
        """The trace of a plan over N = num_sequences * T tokens. `dropped` is what dispatch counted."""
        shape = (num_sequences, plan.slots_N.shape[0] // num_sequences)
        return cls(
            importance_BT=plan.importance_N.reshape(shape),
            slots_BT=plan.slots_N.reshape(shape),
            real_slots_BT=plan.real_slots_N.reshape(shape),
            virtual_slots_BT=plan.virtual_slots_N.reshape(shape),
            expert_ids_BTK=plan.expert_ids_NK.reshape(*shape, plan.expert_ids_NK.shape[1]),
            losses=plan.losses,
            metrics={**plan.metrics, "dropped": jnp.asarray(dropped, jnp.float32)},
        )

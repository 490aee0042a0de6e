"""`RoutingTrace`: a layer's routing per token and its metrics, in the shape of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.modality import NUM_MODALITIES
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.routing.route import route


@register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingTrace:
    """The routing of one MoE layer. Stacked over layers, every array has a leading L axis."""

    importance_BT: Float[Array, "*L B T"]
    slots_BT: Int[Array, "*L B T"]
    real_slots_BT: Int[Array, "*L B T"]
    virtual_slots_BT: Int[Array, "*L B T"]
    expert_ids_BTK: Int[Array, "*L B T K"]  # E: the slot has no real expert
    losses: dict[str, Array]  # as in the plan: "balance", "importance", "z", unweighted
    metrics: dict[str, Array]  # as in the plan, and "dropped": real slots beyond an expert's capacity, float32

    @classmethod
    def from_plan(
        cls, plan: RoutingPlan, num_sequences: int, dropped: Float[Array, ""] | Int[Array, ""] | int = 0
    ) -> "RoutingTrace":
        """The trace of a plan over N = num_sequences * T tokens. `dropped` is the count from dispatch."""
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


def empty_trace(config: AnyExpertsConfig, num_sequences: int, length: int) -> RoutingTrace:
    """The trace of a stack without MoE layers: every array is stacked over L = 0 of them."""

    def one_layer() -> RoutingTrace:
        tokens = num_sequences * length
        bias_C = jnp.zeros(config.num_columns) if config.expert_bias else None
        rounding = config.with_switches(slot_rounding="round")  # stochastic rounding would need a key
        plan = route(rounding, jnp.zeros((tokens, config.num_columns)), jnp.zeros(tokens), None, bias_C, batch_shards=1)
        return RoutingTrace.from_plan(plan, num_sequences)

    return jax.tree.map(lambda layer: jnp.zeros((0, *layer.shape), layer.dtype), jax.eval_shape(one_layer))


def layer_mean(values_L: Float[Array, " L"]) -> Float[Array, ""]:
    """The mean over MoE layers; 0 for a dense model, which has none."""
    return values_L.sum() / max(values_L.shape[0], 1)


def real_by_modality(
    trace: RoutingTrace, modality_BT: Int[Array, "B T"], valid_BT: Bool[Array, "B T"]
) -> tuple[Int[Array, "B L M"], Int[Array, "B M"]]:
    """Sums the real experts of each row by MoE layer and modality, and counts its valid tokens by modality.

    Args:
      trace: stacked over layers.
    """
    own_BTM = jax.nn.one_hot(modality_BT, NUM_MODALITIES, dtype=jnp.int32) * valid_BT[:, :, None].astype(jnp.int32)
    real_BLM = jnp.einsum("lbt,btm->blm", trace.real_slots_BT.astype(jnp.int32), own_BTM)
    return real_BLM, own_BTM.sum(axis=1, dtype=jnp.int32)

"""`RoutingPlan`: everything that the routing policy hands to dispatch and combine."""

import dataclasses

from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.switches import VirtualOutput
from anyexperts_jax.core.tree import register_dataclass


@dataclasses.dataclass(frozen=True)
class PlanSpec:
    """What dispatch needs to know about the policy; static under `jit`."""

    num_experts: int  # E
    expected_real_slots: float  # the nominal budget of the window in use, which sizes the buffers
    virtual_output: VirtualOutput = "identity"
    num_sequences: int = 1  # N = num_sequences * T, sequence after sequence
    num_groups: int = 1  # the experts are in this many equal groups, and a token's are in `groups_kept` of them
    groups_kept: int = 1


def plan_spec(config: AnyExpertsConfig, budget: float | None = None, num_sequences: int = 1) -> PlanSpec:
    """The spec of the plans that this configuration makes, at a budget; None: its own."""
    return PlanSpec(
        num_experts=config.num_experts,
        expected_real_slots=config.expected_real_slots if budget is None else budget,
        virtual_output=config.switches.virtual_output,
        num_sequences=num_sequences,
        num_groups=config.num_groups,
        groups_kept=config.groups_kept,
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """The experts that each token goes to, and their combine weights. Padding tokens have no slots.

    A slot without a real expert has `expert_ids_NK == E` and weight 0. The id is E and not 0, so that such a slot is
    never dispatched to an expert. Real slots come first in a row, in order of rank.
    """

    expert_ids_NK: Int[Array, "N K"]  # int32 in [0, E]; E: the slot has no real expert
    weights_NK: Float[Array, "N K"]  # float32 combine weights; 0 if the slot has no real expert
    virtual_weight_N: Float[Array, "N"]  # float32, the sum of the virtual slots' combine weights
    importance_N: Float[Array, "N"]  # float32 w in (0, 1)
    slots_N: Int[Array, "N"]  # int32 K_i = real + virtual
    real_slots_N: Int[Array, "N"]
    virtual_slots_N: Int[Array, "N"]
    losses: dict[str, Float[Array, ""]]  # "balance", "importance", "z": unweighted float32 scalars
    metrics: dict[str, Array]  # "load_C", "router_entropy", "mean_slots", "mean_real_slots", "virtual_share", ...
    spec: PlanSpec = dataclasses.field(metadata={"static": True})


DISPATCHED = ("expert_ids_NK", "weights_NK", "virtual_weight_N")  # the arrays of a plan that dispatch reads

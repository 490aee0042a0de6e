"""`RoutingPlan`: all that crosses from the routing policy to dispatch and combine."""

import dataclasses

from jaxtyping import Array, Float, Int

from anyexperts_jax.core.switches import VirtualOutput
from anyexperts_jax.core.tree import register_dataclass


@dataclasses.dataclass(frozen=True)
class PlanSpec:
    """What dispatch must know of the policy, static under `jit`."""

    num_experts: int  # E
    expected_real_slots: float  # the nominal budget of the window in force, which sizes buffers
    virtual_output: VirtualOutput = "identity"
    num_sequences: int = 1  # N = num_sequences * T, sequence after sequence


@register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """Which experts each token goes to, with what weight. Padding tokens hold no slot at all.

    A slot without a real expert has `expert_ids_NK == E` and weight 0: never id 0, so it cannot land on an expert.
    Real slots come first in a row, best ranked first.
    """

    expert_ids_NK: Int[Array, "N K"]  # int32 in [0, E]; E: no real expert in this slot
    weights_NK: Float[Array, "N K"]  # float32 combine weights, 0 where the slot holds no real expert
    virtual_weight_N: Float[Array, "N"]  # float32, the virtual slots' combine weights in sum
    importance_N: Float[Array, "N"]  # float32 w in (0, 1)
    slots_N: Int[Array, "N"]  # int32 K_i = real + virtual
    real_slots_N: Int[Array, "N"]
    virtual_slots_N: Int[Array, "N"]
    losses: dict[str, Float[Array, ""]]  # "balance", "importance", "z": unweighted float32 scalars
    metrics: dict[str, Array]  # "load_C", "router_entropy", "mean_slots", "mean_real_slots", "virtual_share", ...
    spec: PlanSpec = dataclasses.field(metadata={"static": True})


DISPATCHED = ("expert_ids_NK", "weights_NK", "virtual_weight_N")  # what dispatch reads of a plan

"""Decodes with the stacked weights of all layers: only the experts that are hit are read, and no layer is copied."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.registries import IMPLEMENTATIONS
from anyexperts_jax.dispatch.base import DispatchStats, add_virtual_output, sort_slots
from anyexperts_jax.dispatch.execution import Execution, resolve_implementation
from anyexperts_jax.ops.experts import ExpertWeights, InPlace, StackedExperts
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.sharding.placement import Placement, is_split


def reads_in_place(
    config: AnyExpertsConfig,
    tokens: int,
    execution: Execution,
    placement: Placement | None,
    *,
    weights: ExpertWeights,
    dtype: jnp.dtype,
) -> bool:
    """Whether `apply_in_place` computes the same as `apply_plan` for this many tokens, and faster.

    This holds on one device, without drops, for weights that the implementation takes as they are stored.

    Args:
      weights: of the experts of all layers, as they are stored.
      dtype: of the computation.
    """
    if execution.dispatch not in ("auto", "blocks") or (placement is not None and is_split(placement)):
        return False
    own = _in_place(execution, placement, dtype)
    return own is not None and own.pays(tokens * config.slots_bound, config.num_experts, weights, dtype)


def apply_in_place(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: StackedExperts,
    execution: Execution,
    placement: Placement | None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """Like `dispatch.apply.apply_plan`, for the experts of one layer within the stack of all layers.

    Call it only where `reads_in_place` is true.

    It has no gradient, since only decoding calls it.
    """
    own = _in_place(execution, placement, x_ND.dtype)
    assert own is not None
    order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
    y_ND = own.run(x_ND, plan.weights_NK, order, experts)
    stats = DispatchStats(dropped=jnp.zeros((), jnp.int32), rows=order.counts_E.sum(dtype=jnp.int32))
    return add_virtual_output(y_ND, x_ND, plan), stats


def _in_place(execution: Execution, placement: Placement | None, dtype: jnp.dtype) -> InPlace | None:
    name = resolve_implementation(execution, placement, dtype).implementation
    assert name is not None
    found: InPlace | None = IMPLEMENTATIONS[name].in_place
    return found

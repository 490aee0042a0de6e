"""Decodes with the stacked weights of all layers: only the experts that are hit are read, and no layer is copied."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.dispatch.base import DispatchStats, add_virtual_output, sort_slots
from anyexperts_jax.dispatch.execution import Execution, resolve_implementation
from anyexperts_jax.ops.experts import StackedExperts
from anyexperts_jax.ops.routed_mlp import xla
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.sharding.placement import Placement, is_split


def reads_in_place(
    config: AnyExpertsConfig, tokens: int, execution: Execution, placement: Placement | None, dtype: jnp.dtype
) -> bool:
    """Whether `apply_in_place` computes the same as `apply_plan` for this many tokens, and faster.

    This holds on one device, without drops, if XLA's form for few rows would run. The kernels of accelerators need the
    weights of a single layer.
    """
    if execution.dispatch != "blocks" or (placement is not None and is_split(placement)):
        return False
    few = xla.has_few_rows(tokens * config.slots_bound, config.num_experts)
    return few and resolve_implementation(execution, placement, dtype).implementation == "xla"


def apply_in_place(
    x_ND: Float[Array, "N D"], plan: RoutingPlan, experts: StackedExperts
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """Like `dispatch.apply.apply_plan`, for a few tokens and the experts of one layer within the stack of all layers.

    It has no gradient, since only decoding calls it.
    """
    order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
    y_ND = xla.forward_of_few_rows(x_ND, plan.weights_NK, order, experts)
    stats = DispatchStats(dropped=jnp.zeros((), jnp.int32), rows=order.counts_E.sum(dtype=jnp.int32))
    return add_virtual_output(y_ND, x_ND, plan), stats

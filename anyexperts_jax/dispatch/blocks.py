"""Dropless dispatch: an expert takes any number of slots, and time is proportional to the real slots."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.errors import require
from anyexperts_jax.dispatch.base import DispatchStats, sort_slots
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.dispatch.local_tokens import map_local_tokens, token_axes
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import routed_mlp
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.sharding.placement import Placement, is_split
from anyexperts_jax.sharding.specs import parts


def dispatch_blocks(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """A `dispatch.base.Dispatcher`. On a mesh each device runs all experts, but only on its own tokens.

    XLA's partitioner would sort the slots of all tokens on every device and compute every row there. Here each device
    gathers the weights of all experts, in x's dtype, for the duration of the layer, and weight gradients are summed
    over the devices; no row is sent. If the FFN width is split over devices, each has a partial sum, and these are
    added once per token.

    Raises:
      UserError: for sequences, positions or widths that the mesh does not divide.
    """
    if placement is None or not is_split(placement):
        return apply_slots(x_ND, plan.expert_ids_NK, plan.weights_NK, experts, execution)
    width_axes = placement.rules.expert_mlp
    width, split = experts.gate_EDF.shape[2], parts(placement.mesh, width_axes)
    require(width % split == 0, f"experts {width} wide do not split over mesh axes {width_axes} of {split} devices")

    def run(x_BTD: Array, ids_BTK: Array, weights_BTK: Array, experts: ExpertWeights) -> tuple[Array, DispatchStats]:
        x_ND, ids_NK, weights_NK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, ids_BTK, weights_BTK))
        y_ND, stats = apply_slots(x_ND, ids_NK, weights_NK, experts, execution)
        # Summed after combine: one row per token instead of one per slot.
        if split > 1:
            y_ND = lax.psum(y_ND, width_axes)
        return y_ND.reshape(x_BTD.shape), jax.tree.map(lambda count: lax.psum(count, token_axes(placement)), stats)

    return map_local_tokens(run, x_ND, plan, experts, placement)


def apply_slots(
    x_ND: Float[Array, "N D"],
    expert_ids_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    experts: ExpertWeights,
    execution: Execution,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(weighted sum of each token's experts in float32, stats) for the tokens of one device."""
    order = sort_slots(expert_ids_NK, experts.gate_EDF.shape[0])
    y_ND = routed_mlp(x_ND, weights_NK, order, experts, **execution.op_options)
    return y_ND, DispatchStats(dropped=jnp.zeros((), jnp.int32), rows=order.counts_E.sum(dtype=jnp.int32))

"""Every expert on every token, with weight zero if not selected: the oracle for values and gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.dispatch.base import DispatchStats
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.ops._dots import wide_dtype
from anyexperts_jax.ops.expert_mlp import expert_mlp
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.sharding.placement import Placement


def dispatch_dense(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """A `dispatch.base.Dispatcher`. On a mesh XLA partitions it."""
    del placement
    num_experts, tokens = plan.spec.num_experts, x_ND.shape[0]
    chosen_NKE = jax.nn.one_hot(plan.expert_ids_NK, num_experts, dtype=plan.weights_NK.dtype)
    weights_NE = jnp.einsum("NK,NKE->NE", plan.weights_NK, chosen_NKE)
    x_END = jnp.broadcast_to(x_ND[None], (num_experts, *x_ND.shape))
    everything_E = jnp.full(num_experts, tokens, jnp.int32)
    y_END = expert_mlp(x_END, everything_E, *experts, **execution.op_options)
    wide = wide_dtype(x_ND.dtype)
    y_ND = jnp.einsum("NE,END->ND", weights_NE.astype(wide), y_END.astype(wide))
    rows = jnp.asarray(num_experts * tokens, jnp.int32)
    return y_ND, DispatchStats(dropped=jnp.zeros((), jnp.int32), rows=rows)

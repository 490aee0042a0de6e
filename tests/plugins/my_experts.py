"""What a user's own package might hold: a router, an importance regulariser, a dispatcher and an implementation."""

import jax.numpy as jnp

import anyexperts_jax as ax
from anyexperts_jax.ops.expert_ops.plain import REFERENCE


def _params(config, d_model, columns):
    return {"bias": ax.Param((columns,), ("router",), ax.Normal(0.1))}


def _logits(config, params, x_ND, modality_N):
    """Every token likes the same experts, and its own size decides how much."""
    size_N1 = jnp.linalg.norm(x_ND.astype(jnp.float32), axis=1, keepdims=True)
    return size_N1 * params["bias"]


ax.ROUTERS.register("by_size", ax.Router(_params, _logits))


def near_half(seen):
    """|w - 1/2|, summed in place of averaged."""
    return seen.weights_NK, jnp.where(seen.valid_N, jnp.abs(seen.importance_N - 0.5), 0).sum()


ax.REGULARISERS.register("near_half", near_half)


def loop_over_experts(x_ND, plan, experts, execution, placement=None):
    """Every expert in turn on all tokens, in plain Python: slow, short and exact."""
    y_ND = jnp.zeros(x_ND.shape, jnp.float32)
    for e in range(plan.spec.num_experts):
        own = ax.ExpertWeights(*(weight[e : e + 1] for weight in experts))
        counts_1 = jnp.full(1, x_ND.shape[0], jnp.int32)
        y_1ND = ax.expert_mlp(x_ND[None], counts_1, *own, **execution.op_options)
        weight_N = jnp.where(plan.expert_ids_NK == e, plan.weights_NK, 0).sum(axis=1)
        y_ND += weight_N[:, None] * y_1ND[0].astype(jnp.float32)
    rows = jnp.int32(plan.spec.num_experts * x_ND.shape[0])
    return y_ND, ax.DispatchStats(dropped=jnp.int32(0), rows=rows)


ax.DISPATCHERS.register("loop_over_experts", loop_over_experts)
ax.IMPLEMENTATIONS.register("mine", ax.ExpertOps(REFERENCE.expert_mlp, REFERENCE.routed_mlp))

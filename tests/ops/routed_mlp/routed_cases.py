"""Shared by the tests of all kernel implementations of `routed_mlp`."""

import jax
import jax.numpy as jnp

from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.experts import ExpertWeights


def value_and_gradients(plan, operands, run):
    """y, and the gradients of sum(sin(y)) by x, the combine weights and the experts' weights."""

    def total(x, slot_weights, *weights):
        order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
        y = run(x, slot_weights, order, ExpertWeights(*weights))
        return jnp.sin(y).sum(), y

    x, *weights = operands
    (_, y), gradients = jax.value_and_grad(total, range(5), has_aux=True)(x, plan.weights_NK, *weights)
    return y, *gradients

"""The aligned buffer with the reference for its MLP: the composition itself, values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.expert_mlp.reference import aligned_mlp
from anyexperts_jax.ops.routed_mlp import buffered, routed_mlp
from tests.dispatch.plans import EXPERTS, PLANS, make_operands, make_plan


def value_and_gradients(op, plan, operands):
    @jax.jit
    def run(order, slot_weights, x, *weights):
        y, pull = jax.vjp(lambda x, slot_weights, *w: op(x, slot_weights, order, *w), x, slot_weights, *weights)
        return y, *pull(jnp.cos(y))

    order = jax.jit(functools.partial(sort_slots, num_experts=plan.spec.num_experts))(plan.expert_ids_NK)
    return run(order, plan.weights_NK, *operands)


def through_buffer(block):
    return functools.partial(buffered.routed_mlp, mlp=aligned_mlp, block=block)


@pytest.mark.parametrize("name", PLANS)
def test_equals_the_reference(name):
    plan = PLANS[name]
    operands = make_operands(plan.expert_ids_NK.shape[0], plan.spec.num_experts)
    wanted = value_and_gradients(functools.partial(routed_mlp, implementation="reference"), plan, operands)
    found = value_and_gradients(through_buffer(8), plan, operands)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def garbage_in_dead_rows(x_RD, starts_E, counts_E, *weights):
    """An MLP that leaves NaN wherever the buffer allows it, forward and backward."""
    row_R1 = jnp.arange(x_RD.shape[0])[:, None]
    live_R1 = ((row_R1 >= starts_E) & (row_R1 < starts_E + counts_E)).any(1, keepdims=True)

    @jax.custom_vjp
    def poison_values(a):
        return jnp.where(live_R1, a, jnp.nan)

    @jax.custom_vjp
    def poison_gradients(a):
        return a

    poison_values.defvjp(lambda a: (poison_values(a), None), lambda _, d: (jnp.where(live_R1, d, 0),))
    poison_gradients.defvjp(lambda a: (a, None), lambda _, d: (jnp.where(live_R1, d, jnp.nan),))
    return poison_values(aligned_mlp(poison_gradients(x_RD), starts_E, counts_E, *weights))


@pytest.mark.parametrize("name", ["random", "all slots virtual", "experts without tokens"])
def test_dead_rows_reach_no_result(name):
    plan = PLANS[name]
    operands = make_operands(plan.expert_ids_NK.shape[0])
    poisoned = functools.partial(buffered.routed_mlp, mlp=garbage_in_dead_rows, block=4)
    for a, b in zip(
        value_and_gradients(poisoned, plan, operands),
        value_and_gradients(through_buffer(4), plan, operands),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_tokens_without_slots_may_hold_anything():
    plan = make_plan([[0], [EXPERTS], [4], [EXPERTS]])
    x, *weights = make_operands(4)
    poisoned = (x.at[np.array([1, 3])].set(jnp.nan), *weights)
    for array in value_and_gradients(through_buffer(4), plan, poisoned):
        assert np.all(np.isfinite(array))


def test_bfloat16_is_summed_in_float32():
    plan = PLANS["random"]
    operands = make_operands(12, dtype=jnp.bfloat16)
    y, d_x, d_slots, *_ = value_and_gradients(through_buffer(8), plan, operands)
    assert (y.dtype, d_x.dtype, d_slots.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    wide = tuple(a.astype(jnp.float32) for a in operands)
    wanted, *_ = value_and_gradients(through_buffer(8), plan, wide)
    np.testing.assert_allclose(y, wanted, atol=0.02 * float(jnp.abs(wanted).max()))

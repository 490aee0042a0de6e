"""The aligned buffer with plain kernels: tests the composition, values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import buffered, routed_mlp
from tests.dispatch.plans import EXPERTS, PLANS, make_operands, make_plan
from tests.ops.routed_mlp.plain_kernels import PLAIN, live_rows


def value_and_gradients(op, plan, operands):
    @jax.jit
    def run(order, slot_weights, x, *weights):
        y, pull = jax.vjp(
            lambda x, slot_weights, *w: op(x, slot_weights, order, ExpertWeights(*w)), x, slot_weights, *weights
        )
        return y, *pull(jnp.cos(y))

    order = jax.jit(functools.partial(sort_slots, num_experts=plan.spec.num_experts))(plan.expert_ids_NK)
    return run(order, plan.weights_NK, *operands)


def through_buffer(block):
    return functools.partial(buffered.routed_mlp, kernels=PLAIN, block=block)


@pytest.mark.parametrize("name", [name for name in PLANS if "output" not in name])
def test_equals_the_reference(name):
    plan = PLANS[name]
    operands = make_operands(plan.expert_ids_NK.shape[0], plan.spec.num_experts)
    wanted = value_and_gradients(functools.partial(routed_mlp, implementation="reference"), plan, operands)
    found = value_and_gradients(through_buffer(8), plan, operands)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def garbage_in_dead_rows(kernel):
    """Puts NaN into the dead rows of all row-shaped results of `kernel`."""

    def poisoned(x_RD, starts_E, counts_E, *operands, **how):
        live_R1 = live_rows(x_RD.shape[0], starts_E, counts_E).any(1, keepdims=True)
        return jax.tree.map(
            lambda a: jnp.where(live_R1, a, jnp.nan), kernel(x_RD, starts_E, counts_E, *operands, **how)
        )

    return poisoned


@pytest.mark.parametrize("name", ["random", "all slots virtual"])
def test_dead_rows_reach_no_result(name):
    plan = PLANS[name]
    operands = make_operands(plan.expert_ids_NK.shape[0])
    rows = {name: garbage_in_dead_rows(getattr(PLAIN, name)) for name in ("forward", "rows_backward")}
    poisoned = functools.partial(buffered.routed_mlp, kernels=PLAIN._replace(**rows), block=4)
    for a, b in zip(
        value_and_gradients(poisoned, plan, operands),
        value_and_gradients(through_buffer(4), plan, operands),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # finite, and the same but for XLA's fusions


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

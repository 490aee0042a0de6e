import dataclasses
import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.registries import IMPLEMENTATIONS
from anyexperts_jax.dispatch import moe_apply, moe_apply_stats
from tests.dispatch.plans import (
    EXPERTS,
    PLANS,
    capacity_of,
    make_operands,
    make_plan,
    oracle_value_and_gradients,
    random_ids,
)

FORMS = ("dense", "capacity", "blocks")
FLOAT32_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@functools.partial(jax.jit, static_argnums=(2, 3))
def value_and_gradients(plan, operands, dispatch, implementation=None):
    """The output, and the gradients of sum(sin(output)) by x, combine weights, virtual weight and experts' weights."""
    how = capacity_of(plan, plan.expert_ids_NK.shape[0]) if dispatch == "capacity" else {"dispatch": dispatch}

    def output(x, slot_weights, virtual_weight, *weights):
        moved = dataclasses.replace(plan, weights_NK=slot_weights, virtual_weight_N=virtual_weight)
        return moe_apply(x, moved, *weights, implementation=implementation, **how)

    x, *weights = operands
    y, pullback = jax.vjp(output, x, plan.weights_NK, plan.virtual_weight_N, *weights)
    return y, pullback(jnp.cos(y))


def assert_matches_oracle(plan, operands, dispatch, implementation=None, **tolerance):
    y, gradients = value_and_gradients(plan, operands, dispatch, implementation)
    expected_y, expected_gradients = oracle_value_and_gradients(plan, operands)
    assert y.dtype == operands[0].dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), expected_y, **tolerance)
    names = ("x", "weights_NK", "virtual_weight_N", "w_gate", "w_up", "w_down")
    real = np.asarray(plan.expert_ids_NK) < plan.spec.num_experts
    for name, actual, expected in zip(names, gradients, expected_gradients, strict=True):
        if name == "weights_NK":
            expected = np.where(real, expected, 0)
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, err_msg=name, **tolerance)


@pytest.mark.parametrize("dispatch", FORMS)
@pytest.mark.parametrize("name", PLANS)
def test_every_form_agrees_with_the_oracle_forward_and_backward(name, dispatch):
    plan = PLANS[name]
    operands = make_operands(plan.expert_ids_NK.shape[0], plan.spec.num_experts)
    assert_matches_oracle(plan, operands, dispatch, **FLOAT32_TOLERANCE)


@pytest.mark.parametrize("dispatch", FORMS)
def test_reference_implementation(dispatch):
    assert_matches_oracle(PLANS["random"], make_operands(12), dispatch, "reference", **FLOAT32_TOLERANCE)


@pytest.mark.parametrize("dispatch", FORMS)
def test_bfloat16_is_within_two_percent_in_norm(dispatch):
    """bfloat16 keeps 8 bits: rounding x, hidden and y once each leaves about 1%."""
    plan, operands = PLANS["many tokens"], make_operands(301, dtype=jnp.bfloat16)
    y, gradients = value_and_gradients(plan, operands, dispatch)
    expected_y, expected_gradients = oracle_value_and_gradients(plan, operands)
    assert y.dtype == jnp.bfloat16
    for actual, expected in zip(
        (y, gradients[0], *gradients[3:]), (expected_y, expected_gradients[0], *expected_gradients[3:]), strict=True
    ):
        assert np.linalg.norm(np.asarray(actual, np.float64) - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2**16), tokens=st.sampled_from([1, 5, 16]), slots=st.sampled_from([1, 3, 7]))
def test_forms_agree_on_random_plans(seed, tokens, slots):
    plan = make_plan(random_ids(np.random.default_rng(seed), tokens, slots), seed=seed)
    operands = make_operands(tokens, seed=seed)
    expected_y, expected_gradients = oracle_value_and_gradients(plan, operands)
    for dispatch in FORMS:
        y, gradients = value_and_gradients(plan, operands, dispatch)
        np.testing.assert_allclose(y, expected_y, **FLOAT32_TOLERANCE)
        np.testing.assert_allclose(gradients[0], expected_gradients[0], **FLOAT32_TOLERANCE)


@pytest.mark.parametrize("dispatch", FORMS)
def test_fully_padded_batch_gives_zeros_and_zero_gradients(dispatch):
    plan = dataclasses.replace(PLANS["all slots virtual"], virtual_weight_N=jnp.zeros(4))
    y, gradients = value_and_gradients(plan, make_operands(4), dispatch)
    for array in (y, gradients[0], *gradients[3:]):
        assert not np.any(array)


def test_stats_count_rows():
    plan = PLANS["random"]
    x, *weights = make_operands(12)
    count = jax.jit(moe_apply_stats, static_argnames=("dispatch", "capacity_factor"))
    rows = {d: int(count(x, plan, *weights, dispatch=d)[1].rows) for d in ("blocks", "dense")}
    assert rows == {"blocks": (plan.expert_ids_NK < EXPERTS).sum(), "dense": 12 * EXPERTS}
    _, stats = count(x, plan, *weights, **capacity_of(plan, 4))
    assert int(stats.rows) == 4 * EXPERTS


@pytest.mark.parametrize("dispatch", ["blocks", "capacity"])
def test_recomputed_residuals_change_nothing_but_memory(dispatch):
    plan, (x, *weights) = PLANS["random"], make_operands(12)

    def gradients(residuals):
        def total(x, *weights):
            return jnp.sin(moe_apply(x, plan, *weights, residuals=residuals, **how)).sum()

        return jax.jit(jax.grad(total, range(4)))(x, *weights)

    how = capacity_of(plan, 12) if dispatch == "capacity" else {"dispatch": dispatch}
    chex.assert_trees_all_close(gradients("recomputed"), gradients("saved"), **FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dispatch": "sparse"}, "dispatch='sparse' is unknown; valid: auto, blocks, capacity, dense, exchange"),
        ({"implementation": "cuda"}, f"implementation='cuda' is unknown; valid: {', '.join(IMPLEMENTATIONS)}"),
        ({"residuals": "all"}, "residuals='all' is unknown; valid: saved, recomputed"),
        ({"capacity_factor": 0}, "capacity_factor=0 must be > 0"),
        ({"exchange_chunks": 1.5}, "exchange_chunks=1.5 must be a whole number"),
        ({"overflow": "ignore"}, "overflow='ignore' is unknown; valid: drop, fallback"),
        (
            {"dispach": "dense"},
            "unknown argument dispach; valid: placement, num_sequences, dispatch, implementation, residuals, "
            "capacity_factor, overflow, exchange_chunks",
        ),
        (
            {"dispatch": "exchange"},
            "dispatch='exchange' needs a mesh: pass placement=Placement(mesh), or use dispatch='blocks'",
        ),
        ({"num_sequences": 5}, "num_sequences=5 must divide the 12 tokens"),
    ],
)
def test_wrong_options_say_what_is_valid(options, words):
    x, *weights = make_operands(12)
    with pytest.raises(UserError) as error:
        moe_apply(x, PLANS["random"], *weights, **options)
    assert str(error.value) == words


def test_operands_that_do_not_fit_the_plan():
    x, *weights = make_operands(11)
    with pytest.raises(UserError, match="x_ND holds 11 tokens, the plan 12"):
        moe_apply(x, PLANS["random"], *weights)
    x, *weights = make_operands(12, num_experts=4)
    with pytest.raises(UserError, match="the weights hold 4 experts, the plan routes to 5"):
        moe_apply(x, PLANS["random"], *weights)

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from anyexperts_jax.dispatch import moe_apply, moe_apply_stats
from anyexperts_jax.dispatch.capacity import rows_per_expert
from anyexperts_jax.routing.plan import PlanSpec
from tests.dispatch.plans import EXPERTS, capacity_of, make_operands, make_plan, random_ids


@functools.partial(jax.jit, static_argnames=("capacity", "num_sequences"))
def run_capacity(x, plan, *weights, capacity, **options):
    return moe_apply_stats(x, plan, *weights, **capacity_of(plan, capacity), **options)


@pytest.mark.parametrize(
    ("expected_real_slots", "capacity_factor", "tokens", "rows"),
    [
        (2.0, 1.25, 16, 8),  # 1.25 * 2 * 16 / 5 = 8
        (2.0, 1.3, 16, 9),  # 8.32, rounded up
        (0.1, 1.0, 1, 1),  # never none
        (5.0, 9.0, 4, 4),  # a token goes to an expert once: never more than N
    ],
)
def test_buffers_follow_the_budget(expected_real_slots, capacity_factor, tokens, rows):
    assert rows_per_expert(PlanSpec(EXPERTS, expected_real_slots), capacity_factor, tokens) == rows


def test_overflow_drops_the_latest_tokens_and_counts_them():
    plan = make_plan([[2], [2], [EXPERTS], [2], [0]])
    x, *weights = make_operands(5)
    y, stats = run_capacity(x, plan, *weights, capacity=2)
    exact = jax.jit(moe_apply)(x, plan, *weights)
    assert int(stats.dropped) == 1
    np.testing.assert_allclose(y[np.array([0, 1, 2, 4])], exact[np.array([0, 1, 2, 4])], rtol=1e-6)
    np.testing.assert_allclose(y[3], plan.virtual_weight_N[3] * x[3], rtol=1e-6)


def test_dropped_slots_get_no_gradient():
    plan = make_plan(np.zeros((6, 1)), virtual_output="zero")
    x, *weights = make_operands(6)
    gradient = jax.jit(jax.grad(lambda x: run_capacity(x, plan, *weights, capacity=4)[0].sum()))(x)
    assert np.all(np.abs(gradient[:4]).sum(1) > 0)
    assert not np.any(gradient[4:])


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_no_token_is_affected_by_a_later_one_of_any_sequence(num_sequences):
    """With other routes and values from position t on, earlier results do not change by a bit, including drops."""
    rng = np.random.default_rng(0)
    positions, slots, t = 8, 2, 5
    tokens = num_sequences * positions
    late = np.arange(tokens) % positions >= t
    ids = random_ids(rng, tokens, slots)
    other_ids = np.where(late[:, None], random_ids(rng, tokens, slots), ids)
    plan, other = make_plan(ids), make_plan(other_ids)
    other = dataclasses.replace(
        other,
        weights_NK=jnp.where(late[:, None], other.weights_NK, plan.weights_NK),
        virtual_weight_N=plan.virtual_weight_N,
    )
    x, *weights = make_operands(tokens)
    other_x = jnp.where(late[:, None], x + 1, x)

    def run(x, plan):
        return run_capacity(x, plan, *weights, capacity=2, num_sequences=num_sequences)

    (y, stats), (other_y, _) = run(x, plan), run(other_x, other)
    assert int(stats.dropped) > 0
    np.testing.assert_array_equal(y[~late], other_y[~late])
    assert np.any(y[late] != other_y[late])


@pytest.mark.slow
def test_fallback_is_exact_with_and_without_overflow():
    x, *weights = make_operands(9)
    for ids in (np.zeros((9, 1)), np.arange(9)[:, None] % EXPERTS):
        plan = make_plan(ids, expected_real_slots=1.0)

        def loss(x, *weights, plan=plan, **options):
            return jnp.sin(moe_apply(x, plan, *weights, **options)).sum()

        exact_where_full = functools.partial(moe_apply_stats, dispatch="capacity", overflow="fallback")
        _, stats = jax.jit(exact_where_full)(x, plan, *weights)
        assert int(stats.dropped) == 0
        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)), static_argnames=("dispatch", "overflow"))
        exact = run(x, *weights, dispatch="dense")
        fallback = run(x, *weights, dispatch="capacity", overflow="fallback")
        chex.assert_trees_all_close(exact, fallback, rtol=2e-5, atol=2e-5)


def test_sharded_over_data_and_experts_equals_one_device():
    num_experts, tokens = 4, 32
    plan = make_plan(random_ids(np.random.default_rng(3), tokens, 3, num_experts), num_experts)
    operands = make_operands(tokens, num_experts)

    def run(x, plan, *weights):
        def loss(x, *weights):
            y, stats = moe_apply_stats(x, plan, *weights, **capacity_of(plan, 12))
            return jnp.sin(y).sum(), (y, stats)

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(x, *weights)

    mesh = jax.make_mesh((4, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    by_token = NamedSharding(mesh, P("data"))
    by_expert = NamedSharding(mesh, P("expert"))
    sharded = (
        jax.device_put(operands[0], by_token),
        jax.device_put(plan, by_token),
        *(jax.device_put(w, by_expert) for w in operands[1:]),
    )
    here = jax.jit(run)(operands[0], plan, *operands[1:])
    there = jax.jit(run)(*sharded)
    chex.assert_trees_all_close(here, there, rtol=1e-5, atol=1e-5)
    assert there[1][1].sharding.is_equivalent_to(by_expert, 3)

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.small import FAST_COMPILE

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import buffered, routed_mlp, xla
from anyexperts_jax.ops.routed_mlp.few_rows import few_rows
from anyexperts_jax.ops.routed_mlp.loop import row_sizes
from tests.dispatch.plans import EXPERTS, PLANS, make_operands, make_plan, oracle
from tests.ops.routed_mlp.plain_kernels import PLAIN

compiled = functools.partial(jax.jit, static_argnums=2, compiler_options=FAST_COMPILE)


def total(plan, operands, implementation):
    x, *weights = operands
    order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
    return routed_mlp(x, plan.weights_NK, order, ExpertWeights(*weights), implementation=implementation)


run = compiled(total)


@compiled
def gradients(plan, operands, implementation):
    def loss(x, weights_NK, *weights):
        return jnp.sin(total(dataclasses.replace(plan, weights_NK=weights_NK), (x, *weights), implementation)).sum()

    x, *weights = operands
    return jax.grad(loss, range(5))(x, plan.weights_NK, *weights)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["one token", "one token without slots", "many tokens"])
def test_values_without_a_gradient(name, implementation):
    plan = PLANS[name]
    operands = make_operands(plan.expert_ids_NK.shape[0])
    x, *weights = operands
    expected = oracle(x, plan.weights_NK, jnp.zeros_like(plan.virtual_weight_N), *weights, plan)
    np.testing.assert_allclose(run(plan, operands, implementation), expected, rtol=2e-5, atol=2e-5)


def test_few_rows_equal_the_loop():
    plan = PLANS["experts without tokens"]
    x, *weights = make_operands(6)
    order = sort_slots(plan.expert_ids_NK, EXPERTS)
    y_RD = few_rows(x, plan.weights_NK, order, ExpertWeights(*weights))
    expected = run(plan, (x, *weights), "xla")
    np.testing.assert_allclose(y_RD[order.places_NK].sum(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_gives_the_references_values_and_gradients(name):
    plan = PLANS[name]
    operands = make_operands(plan.expert_ids_NK.shape[0], plan.spec.num_experts)
    expected = run(plan, operands, "reference")
    np.testing.assert_allclose(run(plan, operands, "xla"), expected, rtol=2e-5, atol=2e-5)
    found, expected = (gradients(plan, operands, name) for name in ("xla", "reference"))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", ["reference", "xla", "buffer"])
def test_an_order_without_the_empty_slots_gives_the_same(form):
    """The exchange passes such orders: its rows have room for K slots, and few of these are real."""
    plan = PLANS["random"]
    real = int((plan.expert_ids_NK < EXPERTS).sum())
    operands = make_operands(plan.expert_ids_NK.shape[0])
    buffer = functools.partial(buffered.routed_mlp, kernels=PLAIN, block=8)
    op = buffer if form == "buffer" else functools.partial(routed_mlp, implementation=form)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(x, weights_NK, *weights):
        def total(x, weights_NK, *weights):
            order = sort_slots(plan.expert_ids_NK, EXPERTS, most_real=real)
            assert order.slots_R.size == real < weights_NK.size
            return jnp.sin(op(x, weights_NK, order, ExpertWeights(*weights))).sum()

        return jax.grad(total, range(5))(x, weights_NK, *weights)

    x, *weights = operands
    found = run(x, plan.weights_NK, *weights)
    chex.assert_trees_all_close(found, gradients(plan, operands, "reference"), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("hot", [300, 210, 190])
def test_one_expert_far_over_the_largest_size(hot):
    """Blocks after the first: up to 300 rows on one expert, where a balanced draw gives 60."""
    ids = np.where(np.arange(300) < hot, 2, 0)[:, None]
    assert row_sizes(300, 300, EXPERTS)[-1] < 100
    plan, operands = make_plan(ids), make_operands(300)
    found, expected = (gradients(plan, operands, name) for name in ("xla", "reference"))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, -1, +1, +7, +8, +9, +40])
def test_loads_about_the_largest_size(count):
    """Expert 1 has no slot, one, or about as many as the largest size (a signed `count` is relative to it)."""
    rows = row_sizes(48, 48, EXPERTS)[-1]
    hot = count if count in (0, 1) else min(48, rows + count)
    ids = np.where(np.arange(48) < hot, 1, 2 + np.arange(48) % 3)[:, None]
    plan, operands = make_plan(ids), make_operands(48)
    np.testing.assert_allclose(run(plan, operands, "xla"), run(plan, operands, "reference"), rtol=2e-5, atol=2e-5)
    found = gradients(plan, operands, "xla")
    chex.assert_trees_all_close(found, gradients(plan, operands, "reference"), rtol=1e-4, atol=2e-5)
    assert not np.asarray(found[2][0]).any()  # expert 0 has no row


def test_bfloat16():
    """Against float32 on the same rounded operands; 2% of the largest value is a few roundings of bfloat16."""
    ids = np.random.default_rng(0).integers(0, EXPERTS, size=(64, 2))
    ids[:, 1] = np.where(ids[:, 1] == ids[:, 0], EXPERTS, ids[:, 1])
    plan, operands = make_plan(ids), [a.astype(jnp.bfloat16) for a in make_operands(64)]
    wide = [a.astype(jnp.float32) for a in operands]
    for a, b in zip(gradients(plan, operands, "xla"), gradients(plan, wide, "reference"), strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.02 * float(jnp.abs(b).max()))


def test_the_shape_decides_the_form(monkeypatch):
    taken = []

    def few_rows(x_ND, weights_NK, *operands):
        taken.append("few_rows")
        return jnp.zeros((weights_NK.size, x_ND.shape[1]))

    def loop_forward(x_ND, *operands, keep):
        taken.append("loop")
        return x_ND, None

    monkeypatch.setattr(xla, "few_rows", few_rows)
    monkeypatch.setattr(xla.loop, "forward", loop_forward)
    for tokens, slots, experts in ((4, 2, 8), (4096, 8, 32)):  # 1 and 1024 rows an expert
        weights_NK = jnp.zeros((tokens, slots))
        order = sort_slots(jnp.zeros((tokens, slots), jnp.int32), experts)
        weights = ExpertWeights(jnp.zeros((experts, 4, 3)), jnp.zeros((experts, 4, 3)), jnp.zeros((experts, 3, 4)))
        for keep in (False, True):
            xla.forward(jnp.zeros((tokens, 4)), weights_NK, order, weights, keep=keep)
    assert taken == ["few_rows", "loop", "loop", "loop"]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_tokens_without_slots_may_hold_anything(implementation):
    """Padding shares blocks with real rows; a NaN there must reach no output and no gradient."""
    plan = make_plan([[0], [EXPERTS], [4], [EXPERTS]])
    x, *weights = make_operands(4)
    poisoned = x.at[np.array([1, 3])].set(jnp.nan)

    operands = (poisoned, *weights)
    for array in (run(plan, operands, implementation), *gradients(plan, operands, implementation)):
        assert np.all(np.isfinite(array))


@pytest.mark.parametrize(
    ("slots", "tokens", "experts"), [(1, 1, 1), (8, 4, 64), (32768, 4096, 32), (12288, 2048, 64), (8192, 1024, 128)]
)
def test_row_sizes_reach_the_likely_loads(slots, tokens, experts):
    sizes = row_sizes(slots, tokens, experts)
    assert sizes[0] == 0
    assert list(sizes) == sorted(set(sizes))
    assert all(size % 8 == 0 for size in sizes)
    assert sizes[-1] >= min(tokens, slots / experts)
    assert len(sizes) <= 14  # each is compiled


def test_an_order_of_other_slots_is_refused():
    x, *weights = make_operands(12)
    order = sort_slots(PLANS["random"].expert_ids_NK, EXPERTS)
    with pytest.raises(UserError, match=r"^weights_NK has shape \(12, 2\), the order is of \(12, 3\) slots$"):
        routed_mlp(x, jnp.zeros((12, 2)), order, ExpertWeights(*weights))

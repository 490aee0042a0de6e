import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.routed_mlp import routed_mlp
from anyexperts_jax.ops.routed_mlp.few_rows import few_rows
from anyexperts_jax.ops.routed_mlp.xla import row_sizes
from tests.dispatch.plans import EXPERTS, PLANS, make_operands, make_plan, oracle


def run(plan, operands, implementation=None):
    x, *weights = operands
    order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
    return routed_mlp(x, plan.weights_NK, order, *weights, implementation)


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
    y_RD = few_rows(x, plan.weights_NK, order, tuple(weights))
    np.testing.assert_allclose(y_RD[order.places_NK].sum(1), run(plan, (x, *weights)), rtol=1e-5, atol=1e-5)


def test_one_expert_far_over_the_largest_size():
    """Blocks past the first: 300 rows on one expert where a fair draw would give 60."""
    ids = np.full((300, 1), 2)
    assert row_sizes(300, 300, EXPERTS)[-1] < 150
    plan, operands = make_plan(ids), make_operands(300)

    def gradients(implementation):
        return jax.grad(lambda *operands: jnp.sin(run(plan, operands, implementation)).sum(), (0, 1, 2, 3))(*operands)

    for a, b in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_tokens_without_slots_may_hold_anything(implementation):
    """Padding shares blocks with real rows; a NaN there must reach no output and no gradient."""
    plan = make_plan([[0], [EXPERTS], [4], [EXPERTS]])
    x, *weights = make_operands(4)
    poisoned = x.at[np.array([1, 3])].set(jnp.nan)

    def total(x, *weights):
        y = run(plan, (x, *weights), implementation)
        return jnp.sin(y).sum(), y

    (_, y), gradients = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(poisoned, *weights)
    for array in (y, *gradients):
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
        routed_mlp(x, jnp.zeros((12, 2)), order, *weights)

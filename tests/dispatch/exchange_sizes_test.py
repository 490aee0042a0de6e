import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.exchange_sizes import BufferSizes, buffer_sizes, expected_devices, uniform_devices
from anyexperts_jax.routing.groups import limit_to_groups
from anyexperts_jax.routing.plan import PlanSpec
from anyexperts_jax.routing.route import route

LING = PlanSpec(256, 8.0, num_groups=8, groups_kept=4)
QWEN = PlanSpec(128, 8.0)
TOKENS = 4000


def simulated(spec, num_devices, slots):
    """The mean over tokens with random scores that are routed like those of a model."""
    scores_NE = jax.random.uniform(jax.random.key(1), (TOKENS, spec.num_experts))
    ids_NK = jax.lax.top_k(limit_to_groups(scores_NE, spec.num_groups, spec.groups_kept), slots)[1]
    return np.mean([len(set(row_K)) for row_K in np.asarray(ids_NK) // (spec.num_experts // num_devices)])


@pytest.mark.parametrize("slots", [1, 2, 5, 8])
@pytest.mark.parametrize(
    ("experts", "groups", "kept", "devices"),
    [
        (128, 1, 1, 8),  # no groups
        (16, 4, 4, 8),  # all groups kept
        (64, 8, 4, 8),  # one group per device
        (64, 8, 2, 4),  # two groups per device
        (64, 4, 2, 16),  # four devices per group
        (24, 6, 3, 4),  # groups that straddle devices
        (16, 16, 8, 8),  # groups of one expert
    ],
)
def test_expected_devices_are_those_of_random_tokens(experts, groups, kept, devices, slots):
    spec = PlanSpec(experts, float(slots), num_groups=groups, groups_kept=kept)
    assert expected_devices(spec, devices) == pytest.approx(simulated(spec, devices, slots), rel=0.015)


def test_all_sets_of_experts_counted():
    """Two of four experts on two devices: 2 of 6 pairs lie on one device."""
    assert uniform_devices(4, 2, 2) == pytest.approx((2 * 1 + 4 * 2) / 6)
    assert uniform_devices(4, 4, 3) == pytest.approx(3)
    assert uniform_devices(4, 1, 3) == 1
    assert uniform_devices(4, 2, 0) == 0


@pytest.mark.parametrize("spec", [LING, QWEN])
def test_between_whole_budgets_the_mean_is_linear_and_rises_slower_than_slots(spec):
    at = [expected_devices(dataclasses.replace(spec, expected_real_slots=k), 8) for k in (0.0, 0.5, 1.0, 4.0, 4.5, 5.0)]
    assert at[:3] == [0, 0.5, 1]
    assert at[4] == pytest.approx((at[3] + at[5]) / 2)
    assert at[3] < 4
    assert at[5] - at[3] < 1


def test_a_budget_beyond_all_experts_in_reach():
    few = PlanSpec(8, 12.0, num_groups=4, groups_kept=2)
    assert expected_devices(few, 4) == 2
    assert expected_devices(few, 2) == pytest.approx(5 / 3, rel=0.02)  # of 6 pairs of groups 4 lie on both devices


def test_numbers_of_slots_that_vary_need_fewer_rows():
    """With importance a token has 4 to 8 slots; the mean of the budget is an upper bound."""
    moe = AnyExpertsConfig(num_experts=32, num_virtual=8, k_min=4, k_max=12, num_groups=8, groups_kept=4)
    keys = jax.random.split(jax.random.key(0), 2)
    logits_NC = jax.random.normal(keys[0], (TOKENS, moe.num_columns))
    plan = jax.jit(lambda *given: route(moe, *given))(logits_NC, 3 * jax.random.normal(keys[1], (TOKENS,)))
    devices_NK = np.asarray(plan.expert_ids_NK) // 4
    found = np.mean([len(set(row_K) - {8}) for row_K in devices_NK])
    assert (plan.spec.num_groups, plan.spec.groups_kept) == (8, 4)
    own = dataclasses.replace(plan.spec, expected_real_slots=float(jnp.mean(plan.real_slots_N.astype(jnp.float32))))
    assert 0.9 * expected_devices(own, 8) < found <= 1.02 * expected_devices(own, 8)


@pytest.mark.parametrize(
    ("spec", "budget", "tokens", "sizes"),
    [
        (QWEN, 8.0, 1024, BufferSizes(rows=855, slots=1280)),  # 5.34 of 8 devices
        (QWEN, 4.8, 1024, BufferSizes(rows=612, slots=768)),  # 3.82
        (QWEN, 8.0, 4, BufferSizes(rows=4, slots=12)),  # all tokens, and a whole one
        (QWEN, 0.1, 4, BufferSizes(rows=1, slots=12)),
        (dataclasses.replace(QWEN, num_experts=8), 8.0, 1024, BufferSizes(rows=1024, slots=1280)),  # one expert each
    ],
)
def test_buffers_follow_the_budget(spec, budget, tokens, sizes):
    spec = dataclasses.replace(spec, expected_real_slots=budget)
    assert buffer_sizes(spec, 1.25, tokens, 8, slots_bound=12) == sizes


def test_groups_make_fewer_rows():
    """Qwen3-30B-A3B's shape: a third fewer rows than slots; Ling-mini-2.0's: half."""
    rows = {spec: buffer_sizes(spec, 1.25, 4096, 8, 12).rows / (1.25 * 4096) for spec in (QWEN, LING)}
    assert rows[QWEN] < 0.7
    assert rows[LING] == pytest.approx(3.95 / 8, rel=0.01)


def test_experts_that_do_not_split_are_refused():
    with pytest.raises(UserError, match="128 experts do not split over 7 devices"):
        expected_devices(QWEN, 7)

import dataclasses
import time

import pytest

from anyexperts_jax.core.config import AnyExpertsConfig, round_half_up
from anyexperts_jax.core.errors import UserError


def test_defaults_are_the_papers_main_model():
    config = AnyExpertsConfig()
    assert (config.num_experts, config.num_virtual, config.k_min, config.k_max) == (256, 64, 8, 12)
    assert (config.rho_max, config.alpha, config.balance_weight, config.importance_weight) == (0.2, 0.01, 0.01, 0.001)
    assert config.num_columns == 320
    assert config.slots_bound == 12
    assert config.expected_real_slots == pytest.approx(8.0)  # 0.8 * (8 + 12) / 2
    # round(0.2 K) for K = 0..12; 0.2 * 3 = 0.6 -> 1, 0.2 * 8 = 1.6 -> 2, 0.2 * 12 = 2.4 -> 2
    assert config.virtual_caps == (0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2)


def test_caps_are_exact_in_the_decimal_digits_of_rho_max():
    # In binary 0.29 * 100 is 28.999999999999996, whose floor is 28; the floor of the decimal product is 29.
    fields = {"num_experts": 100, "num_virtual": 100, "k_min": 1, "k_max": 100, "cap_rounding": "floor"}
    assert AnyExpertsConfig(**fields, rho_max=0.29).virtual_caps[100] == 29


def test_caps_floor_keeps_the_share_for_every_slot_count():
    config = AnyExpertsConfig(cap_rounding="floor")
    assert config.virtual_caps == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2)
    assert all(cap <= 0.2 * k for k, cap in enumerate(config.virtual_caps))


def test_caps_never_exceed_the_virtual_experts_there_are():
    config = AnyExpertsConfig(num_experts=8, num_virtual=2, k_min=4, k_max=8, rho_max=0.5)
    assert config.virtual_caps == (0, 1, 1, 2, 2, 2, 2, 2, 2)


@pytest.mark.parametrize(
    ("rounding", "k_max", "bound"), [("round", 9.5, 10), ("round", 9.25, 9), ("stochastic", 9.25, 10), ("floor", 9, 9)]
)
def test_slots_bound_covers_what_rounding_can_give(rounding, k_max, bound):
    assert AnyExpertsConfig(k_max=k_max, slot_rounding=rounding).slots_bound == bound


def test_static_top_k_needs_no_importance():
    config = AnyExpertsConfig.static_top_k(32, 8, scores="sigmoid")
    assert (config.num_columns, config.slots_bound, config.expected_real_slots) == (32, 8, 8)
    assert config.scores == "sigmoid"
    assert not config.uses_importance
    assert config.virtual_caps == (0,) * 9


@pytest.mark.parametrize(("k_max", "iar", "hsm_site"), [(9, "off", "off"), (8, "add", "off"), (8, "off", "residual")])
def test_importance_is_used_by_a_window_by_iar_and_by_modulation(k_max, iar, hsm_site):
    assert AnyExpertsConfig(k_min=8, k_max=k_max, iar=iar, hsm_site=hsm_site).uses_importance


def test_experts_in_reach_after_group_limiting():
    assert AnyExpertsConfig(num_groups=8, groups_kept=4).experts_in_reach == 128


@pytest.mark.parametrize("cap_rounding", ["round", "floor", "off"])
@pytest.mark.parametrize("rho_max", [0.0, 0.2, 0.29, 0.5, 0.95])
def test_more_slots_never_mean_fewer_real_ones(rho_max, cap_rounding):
    """So checking the ends of the window is enough, and millions of slots are checked at once."""
    virtual = 3 if rho_max else 0
    config = AnyExpertsConfig(num_virtual=virtual, k_min=1, k_max=60, rho_max=rho_max, cap_rounding=cap_rounding)
    real = [slots - cap for slots, cap in enumerate(config.virtual_caps)]
    assert real == sorted(real)
    assert config.virtual_caps == tuple(map(config.virtual_cap, range(61)))


def test_millions_of_slots_are_checked_at_once():
    start = time.process_time()
    with pytest.raises(UserError, match=r"k_max=20000000.0 exceeds num_experts \+ num_virtual = 320"):
        AnyExpertsConfig(k_max=2e7)
    AnyExpertsConfig(num_experts=30_000_000, k_max=2e7)
    assert time.process_time() - start < 1


def test_halves_round_up():
    assert [round_half_up(x) for x in (0.5, 1.5, 2.5, 2.49, -0.5)] == [1, 2, 3, 2, 0]


def test_config_is_hashable_so_that_jit_can_take_it_as_static():
    assert hash(AnyExpertsConfig()) == hash(AnyExpertsConfig())
    assert AnyExpertsConfig() != dataclasses.replace(AnyExpertsConfig(), alpha=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"iar": "addd"},
            "iar='addd' is unknown; valid: add, multiply_logits, multiply_sigmoid, multiply_softmax, off",
        ),
        ({"k_min": 13}, "k_min=13 > k_max=12; need k_min <= k_max"),
        ({"k_min": 0.5}, "k_min=0.5 must be >= 1"),
        ({"rho_max": 1.0}, "rho_max=1.0 must be in [0, 1)"),
        ({"rho_max": -0.1}, "rho_max=-0.1 must be in [0, 1)"),
        ({"num_virtual": 0}, "num_virtual=0 leaves nothing for rho_max=0.2; set rho_max=0 or num_virtual > 0"),
        ({"num_virtual": -1}, "num_virtual=-1 must be >= 0"),
        ({"num_experts": 0}, "num_experts=0 must be >= 1"),
        ({"num_experts": 4, "num_virtual": 4}, "k_max=12 exceeds num_experts + num_virtual = 8"),
        (
            {"num_experts": 8},  # at K = 12 two slots may be virtual: ten real experts are needed
            "k_max=12 can need 10 real experts of 8 in reach; lower k_max, or raise num_experts, "
            "groups_kept or rho_max",
        ),
        (
            {"num_groups": 32, "groups_kept": 1},
            "k_max=12 can need 10 real experts of 8 in reach; lower k_max, or raise num_experts, "
            "groups_kept or rho_max",
        ),
        ({"num_groups": 7}, "num_groups=7 must divide num_experts=256"),
        ({"groups_kept": 2}, "groups_kept=2 must be in [1, num_groups=1]"),
        ({"iar": "multiply_sigmoid"}, "iar='multiply_sigmoid' multiplies sigmoid scores, but scores='softmax'"),
        ({"iar": "multiply_softmax", "scores": "sigmoid"}, "iar='multiply_softmax' multiplies softmax scores"),
        ({"alpha": -0.01}, "alpha=-0.01 is negative; it must be >= 0"),
        ({"z_weight": float("nan")}, "z_weight=nan must be a finite number"),
        ({"scaling_factor": 0}, "scaling_factor=0 must be > 0"),
        ({"importance_target": 1}, "importance_target=1 must be in (0, 1)"),
        ({"router": "liner"}, "router='liner' is unknown; valid: linear, per_modality, per_modality_shared, dtr, dtr"),
        ({"importance_regulariser": "l2"}, "importance_regulariser='l2' is unknown; valid: logit_l2, mean_target, sal"),
        ({"num_experts": 256.0}, "num_experts=256.0 must be a whole number"),
        ({"k_max": "12"}, "k_max='12' must be a finite number"),
        ({"k_max": float("inf")}, "k_max=inf must be a finite number"),
        ({"expert_bias": 1}, "expert_bias=1 must be True or False"),
    ],
)
def test_a_bad_value_is_refused_with_value_and_rule_in_one_line(fields, message):
    with pytest.raises(UserError) as error:
        AnyExpertsConfig(**fields)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)

import jax
import jax.numpy as jnp
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.routing.slots import continuous_slots, round_slots, virtual_cap

W = jnp.array([0.0, 0.1, 0.125, 0.5, 0.6, 0.875, 1.0])  # 8 + 4 w = 8, 8.4, 8.5, 10, 10.4, 11.5, 12


def test_linear_slots_round_half_up():
    config = AnyExpertsConfig()
    slots = round_slots(config, continuous_slots(config, W))
    assert slots.dtype == jnp.int32
    assert slots.tolist() == [8, 8, 9, 10, 10, 12, 12]


def test_floor():
    config = AnyExpertsConfig(slot_rounding="floor")
    assert round_slots(config, continuous_slots(config, W)).tolist() == [8, 8, 8, 10, 10, 11, 12]


def test_stochastic_rounds_up_with_the_fraction_as_probability():
    config = AnyExpertsConfig(slot_rounding="stochastic")
    slots = round_slots(config, jnp.full(20_000, 10.4), jax.random.key(0))
    assert set(slots.tolist()) == {10, 11}
    # The share of 11s is 0.4 with standard deviation sqrt(0.24 / 20000) = 0.0035; four of them.
    assert float(slots.mean()) == pytest.approx(10.4, abs=0.014)


def test_stochastic_leaves_whole_numbers_alone():
    config = AnyExpertsConfig(slot_rounding="stochastic")
    slots = round_slots(config, jnp.full(20_000, 11.0), jax.random.key(0))
    assert set(slots.tolist()) == {11}


def test_stochastic_without_a_key_is_refused():
    with pytest.raises(UserError, match="needs a random key"):
        round_slots(AnyExpertsConfig(slot_rounding="stochastic"), jnp.ones(3))


def test_window_overrides_the_configs_and_stays_within_the_bound():
    config = AnyExpertsConfig()  # slots_bound 12
    w = jnp.array([0.0, 0.5, 1.0])
    assert round_slots(config, continuous_slots(config, w, jnp.array([4.0, 8.0]))).tolist() == [4, 6, 8]
    assert round_slots(config, continuous_slots(config, w, jnp.array([10.0, 14.0]))).tolist() == [10, 12, 12]
    assert round_slots(config, continuous_slots(config, w, jnp.array([-3.0, 1.0]))).tolist() == [1, 1, 1]


def test_fractional_windows():
    config = AnyExpertsConfig(k_min=7.25, k_max=11.25)
    # 7.25 -> 7, 7.25 + 2 = 9.25 -> 9, 7.25 + 4 * 0.5625 = 9.5 -> 10, 11.25 -> 11
    assert round_slots(config, continuous_slots(config, jnp.array([0.0, 0.5, 0.5625, 1.0]))).tolist() == [7, 9, 10, 11]


def test_a_non_finite_importance_still_gives_a_count_that_fits():
    config = AnyExpertsConfig()
    slots = round_slots(config, continuous_slots(config, jnp.array([jnp.nan, jnp.inf, -jnp.inf])))
    assert ((slots >= 1) & (slots <= 12)).all()


def test_the_cap_follows_the_slots():
    slots = jnp.array([0, 1, 2, 3, 7, 8, 12])
    assert virtual_cap(AnyExpertsConfig(), slots).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_the_papers_window_gives_ten_slots_and_eight_real_on_average():
    # papers/anyexperts.md section 3: with w uniform, round / round is what gives mean K 10 and mean real 8.00.
    config = AnyExpertsConfig()
    slots = round_slots(config, continuous_slots(config, (jnp.arange(4000.0) + 0.5) / 4000))
    assert float(slots.mean()) == pytest.approx(10.0, abs=1e-3)
    assert float((slots - virtual_cap(config, slots)).mean()) == pytest.approx(8.0, abs=1e-3)


def test_rounding_passes_no_gradient():
    config = AnyExpertsConfig()
    grad = jax.grad(lambda w: round_slots(config, continuous_slots(config, w)).astype(jnp.float32).sum())(W)
    assert not grad.any()

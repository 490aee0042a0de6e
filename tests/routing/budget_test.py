import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.routing.budget import calibrate_budget, nearest_budget, shift_budget

PAPER = AnyExpertsConfig()  # 256 + 64 columns, window [8, 12], rho_max 0.2


@pytest.mark.parametrize(
    ("target", "window"),
    [(4.8, (4, 8)), (5.6, (5, 9)), (6.4, (6, 10)), (7.2, (7, 11)), (8.0, (8, 12)), (8.8, (9, 13)), (9.6, (10, 14))],
)
def test_the_papers_budgets_are_the_shifted_windows(target, window):
    config = shift_budget(PAPER, target)
    assert (config.k_min, config.k_max) == window  # exactly: no 5.999
    assert config.expected_real_slots == pytest.approx(target)


def test_windows_may_be_fractional():
    config = shift_budget(PAPER, 5.0)  # 5 / 0.8 = 6.25, +-2
    assert (config.k_min, config.k_max) == (4.25, 8.25)


def test_every_other_field_is_kept():
    config = AnyExpertsConfig(iar="off", alpha=0.05)
    assert shift_budget(config, 8.0) == config


def test_a_nominal_budget_out_of_reach_is_refused_with_the_range():
    # lowest window [1, 5]: 0.8 * 3 = 2.4; highest [316, 320]: 0.8 * 318 = 254.4
    for target, limit in ((2.3, "k_min=0.875 must be >= 1"), (260.0, "k_max=327.0 exceeds num_experts")):
        with pytest.raises(
            UserError, match=r"out of reach: windows 4 wide give nominal budgets from 2.4 to 254.4"
        ) as e:
            shift_budget(PAPER, target)
        assert limit in str(e.value)


@pytest.mark.parametrize("target", [0, -1.0, float("nan"), float("inf")])
def test_an_invalid_budget_is_refused(target):
    with pytest.raises(UserError, match="must be a number of real experts per token, > 0"):
        shift_budget(PAPER, target)


def test_static_top_k_moves_by_whole_experts():
    config = AnyExpertsConfig.static_top_k(32, 8)
    assert (shift_budget(config, 4).k_min, shift_budget(config, 4).k_max) == (4, 4)
    with pytest.raises(UserError, match="every token gets the same whole number of slots; nearest budgets: 4 and 5"):
        shift_budget(config, 4.8)
    with pytest.raises(UserError, match="from 1 to 32"):
        shift_budget(config, 33)


def test_static_stochastic_rounding_reaches_any_budget():
    config = AnyExpertsConfig.static_top_k(32, 8, slot_rounding="stochastic")
    assert shift_budget(config, 4.8).k_max == pytest.approx(4.8)


class Model:
    """Stands in for measuring a model: a realised average as a function of the window; counts its calls."""

    def __init__(self, response):
        self.response, self.calls = response, 0

    def __call__(self, config):
        self.calls += 1
        return self.response(config.k_min, config.k_max)


@pytest.mark.parametrize(
    ("response", "most_calls"),
    [
        (lambda low, high: 0.8 * (low + high) / 2, 1),  # as nominal
        (lambda low, high: 0.8 * (low + 0.3 * (high - low)), 3),  # mean importance 0.3
        (lambda low, high: 0.93 * (low + high) / 2, 4),  # the cap half filled
        (lambda low, high: 1.5 * ((low + high) / 2) ** 0.7, 6),  # saturating
        (lambda low, high: 0.1 * ((low + high) / 2) ** 2, 6),  # growing faster than the window
    ],
)
@pytest.mark.parametrize("target", [4.8, 8.0, 9.6])
def test_calibration_realises_the_target_in_a_few_measurements(response, most_calls, target):
    model = Model(response)
    config = calibrate_budget(PAPER, model, target)
    assert response(config.k_min, config.k_max) == pytest.approx(target, rel=0.01)
    assert config.k_max - config.k_min == 4
    assert model.calls <= most_calls


def test_tolerance_is_relative_and_kept():
    response = lambda low, high: 0.7 * (low + high) / 2  # noqa: E731
    config = calibrate_budget(PAPER, response_of(response), 6.0, tolerance=0.002)
    assert response(config.k_min, config.k_max) == pytest.approx(6.0, rel=0.002)


def response_of(response):
    return lambda config: response(config.k_min, config.k_max)


def test_calibration_of_a_budget_that_moves_in_steps():
    """Importance 0.5 for every token, as at initialisation: all have the same whole number of slots."""
    model = Model(lambda low, high: float(int((low + high) / 2 + 0.5)))
    assert int(sum(window(calibrate_budget(PAPER, model, 7.0))) / 2 + 0.5) == 7
    with pytest.raises(UserError) as error:
        calibrate_budget(PAPER, model, 6.4)
    assert str(error.value).startswith("no window realises target_real=6.4 within 1.00%: 6 at [")
    assert ", 7 at [" in str(error.value)
    assert model.calls < 30


def window(config):
    return config.k_min, config.k_max


def test_a_budget_the_model_cannot_realise_is_refused_with_what_it_reached():
    model = Model(lambda low, high: min(0.7 * high, 8.4))
    with pytest.raises(UserError, match=r"out of reach: the highest window, \[316, 320\], realises 8.4 real experts"):
        calibrate_budget(PAPER, model, 10.0)
    with pytest.raises(UserError, match=r"out of reach: the lowest window, \[1, 5\], realises 3.5 real experts"):
        calibrate_budget(PAPER, model, 2.0)
    assert model.calls < 30


def test_static_top_k_calibrates_over_whole_numbers():
    config = AnyExpertsConfig.static_top_k(32, 8)
    assert calibrate_budget(config, lambda c: c.k_min, 5.0).k_min == 5
    with pytest.raises(UserError, match=r"4 at \[4, 4\], 5 at \[5, 5\]"):
        calibrate_budget(config, lambda c: c.k_min, 4.5)


def test_a_fractional_window_of_one_step_still_calibrates():
    """k_max is 1.25 with a single expert: no whole number of slots above it is allowed."""
    config = AnyExpertsConfig.static_top_k(1, 1, k_max=1.25)
    assert calibrate_budget(config, lambda c: 1.0, 1.0) == config


def test_a_non_finite_measurement_and_a_zero_tolerance_are_refused():
    with pytest.raises(UserError, match=r"the measured budget is nan at \[8, 12\]; it must be finite"):
        calibrate_budget(PAPER, lambda config: float("nan"), 8.0)
    with pytest.raises(UserError, match="tolerance=0"):
        calibrate_budget(PAPER, lambda config: 8.0, 8.0, tolerance=0)


@pytest.mark.parametrize("rho_max", [0.0, 0.2, 1 / 3])
@pytest.mark.parametrize("window", [(1, 3), (1.5, 5.5), (4, 4), (2.25, 2.25)])
@pytest.mark.parametrize("slot_rounding", ["round", "stochastic"])
def test_nearest_budget_has_a_window_and_keeps_a_valid_budget(rho_max, window, slot_rounding):
    virtual = 4 if rho_max else 0
    config = AnyExpertsConfig(16, virtual, *window, rho_max=rho_max, slot_rounding=slot_rounding)
    for target in (0.01, 1.0, 2.7, 4.1, 15.9, 100.0):
        nearest = nearest_budget(config, target)
        found = shift_budget(config, nearest)
        assert found.expected_real_slots == pytest.approx(nearest)
        try:
            shift_budget(config, target)
        except UserError:
            assert nearest != target
        else:
            assert nearest == pytest.approx(target, abs=1e-9)
    assert nearest_budget(config, config.expected_real_slots) == pytest.approx(config.expected_real_slots)
    with pytest.raises(UserError, match="> 0"):
        nearest_budget(config, -1.0)

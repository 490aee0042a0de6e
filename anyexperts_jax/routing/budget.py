"""The budget knob: shifts the slot window, keeping its width, until tokens get the requested average of real
experts."""

import bisect
import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from numbers import Real
from typing import Any

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError, require, shown

_STEPS_PER_SLOT = 256  # resolution of a calibrated window: 0.004 slots


def shift_budget(config: AnyExpertsConfig, target_real: float) -> AnyExpertsConfig:
    """Shifts the window so that the nominal budget, (1 - rho_max) (k_min + k_max) / 2, is `target_real` per token.

    The paper's budgets 4.8, 5.6, ..., 9.6 are the windows [4, 8], [5, 9], ..., [10, 14] (reading). Windows may be
    fractional. The realised budget differs if importance does not average 0.5 or the cap is not filled; see
    `calibrate_budget`.

    Raises:
      UserError: if no window of this width has that nominal budget; the message gives budgets that exist.

    Example:
        >>> import anyexperts_jax as ax
        >>> config = ax.AnyExpertsConfig(k_min=8, k_max=12, rho_max=0.2)
        >>> low = ax.shift_budget(config, 4.8)
        >>> low.k_min, low.k_max
        (4.0, 8.0)
    """
    target_real = _checked_target(target_real)
    shift = _shift_to(config, target_real)
    step = _step(config)
    if step == 1 and shift.denominator != 1:
        below = (_middle(config) + math.floor(shift)) * _real_share(config)
        raise UserError(
            f"target_real={target_real:g} needs a fractional window, but with k_min = k_max and slot_rounding="
            f"{config.switches.slot_rounding!r} every token gets the same whole number of slots; nearest budgets: "
            f"{float(below):g} and {float(below + _real_share(config)):g}"
        )
    try:
        return _shifted(config, shift)
    except UserError as error:
        low, high = (float((_middle(config) + s) * _real_share(config)) for s in _shift_range(config))
        raise UserError(
            f"target_real={target_real:g} is out of reach: windows {float(_width(config)):g} wide give nominal budgets "
            f"from {low:g} to {high:g} ({error})"
        ) from error


def nearest_budget(config: AnyExpertsConfig, target_real: float) -> float:
    """The budget nearest to `target_real`, in real experts per token, for which `shift_budget` finds a window.

    Raises:
      UserError: if `target_real` is not a number > 0.
    """
    target_real = _checked_target(target_real)
    step, share, middle = _step(config), _real_share(config), _middle(config)
    shift = _shift_to(config, target_real)
    if step == 1:
        shift = Fraction(math.floor(shift + Fraction(1, 2)))
    if not _is_valid(config, shift):
        low, high = _shift_range(config)
        if step == 1:
            low, high = Fraction(math.ceil(low)), Fraction(math.floor(high))
        shift = min(max(shift, low), high)
    budget = float((middle + shift) * share)
    # The range checks its ends only, and rounding may move the last digit across one.
    while shift != 0 and not _is_valid(config, _shift_to(config, budget)):
        shift -= min(step, abs(shift)) * (1 if shift > 0 else -1)
        budget = float((middle + shift) * share)
    return budget


def calibrate_budget(
    config: AnyExpertsConfig,
    measure: Callable[[AnyExpertsConfig], float],
    target_real: float,
    *,
    tolerance: float = 0.01,
) -> AnyExpertsConfig:
    """Shifts the window until `measure` finds that data really gets `target_real` real experts per token.

    Args:
      config: the start; the window's width is kept.
      measure: returns the realised average of real slots under a config; it must not fall as the window moves up. It is
        called a few times, first with the nominal window.
      target_real: real experts per token, on average.
      tolerance: relative; 0.01 accepts 7.92 to 8.08 for 8.

    Raises:
      UserError: if no window realises it within the tolerance; the message gives what the nearest or outermost windows
        realise.

    Example:
        >>> import anyexperts_jax as ax
        >>> config = ax.AnyExpertsConfig(k_min=8, k_max=12, rho_max=0.2)
        >>> realised = lambda moe: 0.9 * moe.expected_real_slots  # stands for a measurement on data
        >>> ax.calibrate_budget(config, realised, 7.2).k_max
        12.0
    """
    target_real = _checked_target(target_real)
    require(tolerance > 0, f"tolerance={tolerance} must be > 0")
    search = _Search.start(config, target_real)
    while search.low <= search.high:
        candidate = _shifted(config, search.position * search.step)
        realised = float(measure(candidate))
        require(
            math.isfinite(realised), f"the measured budget is {realised} at {_window(candidate)}; it must be finite"
        )
        if abs(realised - target_real) <= tolerance * target_real:
            return candidate
        search.record(candidate, realised)
    raise UserError(search.failure(tolerance))


@dataclasses.dataclass
class _Search:
    """Finds the window to measure next. Positions count steps of `step` slots from the config's own window."""

    target: float
    step: Fraction
    slope: float  # nominal: real experts per step
    low: int  # low to high are the windows not yet ruled out
    high: int
    position: int
    below: tuple[int, float, str] | None = None  # position, realised average and window of the best below the target
    above: tuple[int, float, str] | None = None  # the same of the best one above
    stride: int = 0
    halve: bool = False

    @classmethod
    def start(cls, config: AnyExpertsConfig, target: float) -> "_Search":
        step = _step(config)
        first, last = _shift_range(config)
        low, high = math.ceil(first / step), math.floor(last / step)
        nominal = round((_exact(target) / _real_share(config) - _middle(config)) / step)
        return cls(
            target, step, float(_real_share(config) * step), low=low, high=high, position=min(max(nominal, low), high)
        )

    def record(self, candidate: AnyExpertsConfig, realised: float) -> None:
        """Rules out the windows on the far side of the measured one and moves to the next position."""
        point = (self.position, realised, _window(candidate))
        if realised < self.target:
            self.low, self.below = self.position + 1, point
        else:
            self.high, self.above = self.position - 1, point
        self.position = min(max(self._next(realised), self.low), self.high)

    def _next(self, realised: float) -> int:
        if self.below is None or self.above is None:
            # Not bracketed yet: the nominal slope lands close. If it falls short, the strides grow.
            stride = (self.target - realised) / self.slope
            self.stride = round(math.copysign(max(abs(stride), 2 * abs(self.stride), 1), stride))
            return self.position + self.stride
        # Bracketed: interpolation converges fast on a smooth response, bisection makes progress on a stepped one.
        self.halve = not self.halve
        if not self.halve:
            return (self.low + self.high) // 2
        (left, short, _), (right, over, _) = self.below, self.above
        return round(left + (right - left) * (self.target - short) / (over - short))

    def failure(self, tolerance: float) -> str:
        if self.below and self.above:
            return (
                f"no window realises target_real={self.target:g} within {tolerance:.2%}: {self.below[1]:.4g} at "
                f"{self.below[2]}, {self.above[1]:.4g} at {self.above[2]}; raise tolerance or use "
                "slot_rounding='stochastic'"
            )
        side, end = ("highest", self.below) if self.below else ("lowest", self.above)
        assert end is not None  # at least one window was measured
        return (
            f"target_real={self.target:g} is out of reach: the {side} window, {end[2]}, realises {end[1]:.4g} real "
            "experts per token"
        )


def _shift_to(config: AnyExpertsConfig, budget: float) -> Fraction:
    """Returns the shift, in slots, from the config's window to that of a nominal budget.

    It is rounded because a budget like 2/3 k is itself a rounded float.
    """
    return round(_exact(budget) / _real_share(config) - _middle(config), 12)


def _window(config: AnyExpertsConfig) -> str:
    return f"[{config.k_min:g}, {config.k_max:g}]"


def _checked_target(target_real: Any) -> float:
    number = isinstance(target_real, Real) and not isinstance(target_real, bool)
    valid = number and math.isfinite(target_real) and target_real > 0
    require(valid, f"target_real={shown(target_real)} must be a number of real experts per token, > 0")
    return float(target_real)


def _exact(x: float) -> Fraction:
    """Returns the decimal number as a fraction: 4.8 becomes 24/5, so that 4.8 / 0.8 is 6 and not 5.999."""
    return Fraction(str(float(x)))


def _real_share(config: AnyExpertsConfig) -> Fraction:
    return 1 - _exact(config.rho_max)


def _middle(config: AnyExpertsConfig) -> Fraction:
    return (_exact(config.k_min) + _exact(config.k_max)) / 2


def _width(config: AnyExpertsConfig) -> Fraction:
    return _exact(config.k_max) - _exact(config.k_min)


def _step(config: AnyExpertsConfig) -> Fraction:
    """The smallest shift worth trying: a whole slot if every token gets the same whole number of slots."""
    static = config.k_min == config.k_max and config.switches.slot_rounding != "stochastic"
    return Fraction(1) if static else Fraction(1, _STEPS_PER_SLOT)


def _shifted(config: AnyExpertsConfig, shift: Fraction) -> AnyExpertsConfig:
    k_min, k_max = _exact(config.k_min) + shift, _exact(config.k_max) + shift
    return dataclasses.replace(config, k_min=float(k_min), k_max=float(k_max))


def _shift_range(config: AnyExpertsConfig) -> tuple[Fraction, Fraction]:
    """The lowest and highest shift that the config's other fields allow. The highest one puts k_max on a whole slot."""
    whole = range(math.floor(config.k_max) + 1, config.num_columns + 1)
    allowed = bisect.bisect_left(whole, True, key=lambda k: not _is_valid(config, k - _exact(config.k_max)))
    highest = math.floor(config.k_max) + allowed - _exact(config.k_max)
    return 1 - _exact(config.k_min), max(highest, Fraction(0))


def _is_valid(config: AnyExpertsConfig, shift: Fraction) -> bool:
    try:
        _shifted(config, shift)
    except UserError:
        return False
    return True

"""Figures over seeds: mean, spread and a bootstrap interval. Differences are paired: one seed, one set of data."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

DRAWS = 9999
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of n seeds' figures. Undefined ones are NaN: all without a seed, spread and interval with one.

    The interval is the percentile bootstrap's of the mean over seeds. With five seeds it never reaches past the
    smallest and the largest of them, and holds less than its nominal 95%.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    """Of one figure a seed; the same values always give the same interval."""
    from scipy.stats import bootstrap

    found = np.asarray(values, np.float64)
    if len(found) == 0:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(found.mean())
    if len(found) == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan)
    sd = float(found.std(ddof=1))
    if np.ptp(found) == 0:
        return Summary(len(found), mean, 0.0, mean, mean)
    drawn = bootstrap(
        (found,), np.mean, n_resamples=DRAWS, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0)
    )
    interval = drawn.confidence_interval
    return Summary(len(found), mean, sd, float(interval.low), float(interval.high))


def interpolate(x: float, known_x: Sequence[float], known_y: Sequence[float]) -> float:
    """y at x on the line through known points; NaN outside of them, where nothing was measured."""
    order = np.argsort(known_x)
    xs, ys = np.asarray(known_x, np.float64)[order], np.asarray(known_y, np.float64)[order]
    return float(np.interp(x, xs, ys, left=math.nan, right=math.nan))

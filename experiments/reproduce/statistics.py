"""Summarises figures over seeds: mean, spread and bootstrap interval. Differences are paired by seed, hence by data."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

DRAWS = 9999
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Summary:
    """The summary of n seeds' figures. Without a seed all values are NaN; with one, spread and interval are.

    The interval is the percentile bootstrap's of the mean over seeds. With five seeds it never extends beyond the
    smallest and the largest value, and its coverage is below the nominal 95%.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    """Summarises one figure per seed; the same values always give the same interval."""
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
    """Returns y at x on the line through known points; NaN outside their range, where nothing was measured."""
    order = np.argsort(known_x)
    xs, ys = np.asarray(known_x, np.float64)[order], np.asarray(known_y, np.float64)[order]
    return float(np.interp(x, xs, ys, left=math.nan, right=math.nan))

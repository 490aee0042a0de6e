"""Means, spreads and intervals against figures by hand."""

import math

import numpy as np
import pytest

from experiments.reproduce.statistics import interpolate, summarise


def test_mean_and_spread_by_hand():
    one = summarise([0.1, 0.2, 0.6])
    assert one.n == 3
    assert one.mean == pytest.approx(0.3)
    assert one.sd == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))


def test_the_interval_is_the_percentile_bootstrap_of_the_mean():
    values = [0.0, 1.0]
    one = summarise(values)  # the mean of two draws is 0, 1/2 or 1, the ends with probability 1/4 each
    assert (one.low, one.high) == (0.0, 1.0)
    many = np.random.default_rng(0).normal(3.0, 2.0, 400)
    wide = summarise(many.tolist())
    assert wide.low == pytest.approx(many.mean() - 1.96 * many.std() / 20, abs=0.03)
    assert wide.high == pytest.approx(many.mean() + 1.96 * many.std() / 20, abs=0.03)


def test_the_interval_is_the_same_every_time():
    assert summarise([1.0, 2.0, 4.0]) == summarise([1.0, 2.0, 4.0])


def test_few_and_equal_values():
    assert summarise([]).n == 0
    assert math.isnan(summarise([]).mean)
    one = summarise([0.5])
    assert (one.n, one.mean) == (1, 0.5)
    assert math.isnan(one.sd)
    assert math.isnan(one.low)
    equal = summarise([0.25, 0.25, 0.25])
    assert (equal.sd, equal.low, equal.high) == (0.0, 0.25, 0.25)


def test_interpolation_between_points_and_never_beyond():
    assert interpolate(5.0, [6.0, 4.0], [0.6, 0.4]) == pytest.approx(0.5)
    assert interpolate(4.0, [6.0, 4.0], [0.6, 0.4]) == pytest.approx(0.4)
    assert math.isnan(interpolate(3.9, [6.0, 4.0], [0.6, 0.4]))
    assert math.isnan(interpolate(6.1, [6.0, 4.0], [0.6, 0.4]))

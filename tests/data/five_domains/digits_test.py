import itertools

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.domain import SPLITS
from anyexperts_jax.data.five_domains import digits


def test_splits_partition_the_scans():
    ranges = [set(digits.split_range(split)) for split in SPLITS]
    assert all(not a & b for a, b in itertools.combinations(ranges, 2))
    assert set().union(*ranges) == set(range(1797))
    with pytest.raises(UserError, match="split='dev'"):
        digits.split_range("dev")


@pytest.mark.parametrize("split", SPLITS)
def test_draws_are_of_the_digit_and_the_split(split):
    rng = np.random.default_rng(0)
    for digit in range(10):
        drawn = {digits.draw_scan(rng, split, digit) for _ in range(30)}
        assert drawn <= set(digits.split_range(split))
        assert {digits.label(scan) for scan in drawn} == {digit}
        assert len(drawn) > 5


def test_a_glyph_is_its_scan_at_twice_the_size():
    from sklearn.datasets import load_digits

    scan = load_digits().images[11]
    glyph = digits.glyph(11)
    assert glyph.shape == (digits.GLYPH, digits.GLYPH)
    by_blocks = glyph.reshape(8, 2, 8, 2).mean(axis=(1, 3)) * 16 / 255
    assert np.abs(by_blocks - scan).max() < 4.5  # smoothed, of 16 grey levels
    assert np.corrcoef(by_blocks.ravel(), scan.ravel())[0, 1] > 0.97
    with pytest.raises(ValueError, match="read-only"):
        glyph[0, 0] = 1

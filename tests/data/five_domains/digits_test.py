import itertools
import re

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.domain import SPLITS
from anyexperts_jax.data.five_domains import digits


def test_splits_partition_the_scans():
    scans = [set(digits.split_scans(split)) for split in SPLITS]
    assert all(not a & b for a, b in itertools.combinations(scans, 2))
    assert set().union(*scans) == set(range(1797))
    with pytest.raises(UserError, match="split='dev'"):
        digits.split_scans("dev")


def test_splits_share_no_handwriting_form():
    """Every writer copied one text: it begins with the digits in order three times and has `0955650989841` once."""
    labels = "".join(str(digits.label(i)) for i in range(1797))
    after_thirty = [found.start() for found in re.finditer("0955650989841", labels)]
    assert [digits.form_of(i) for i in after_thirty] == list(range(14))
    for start, middle in zip(digits.FORM_STARTS, after_thirty, strict=True):
        assert middle - start in (28, 29, 30)  # some scans are missing
        assert labels[start : start + 9] in ("012345678", "123456789")
    forms = [{digits.form_of(i) for i in digits.split_scans(split)} for split in SPLITS]
    assert all(not a & b for a, b in itertools.combinations(forms, 2))


@pytest.mark.parametrize("split", SPLITS)
def test_drawn_scans_have_the_digit_and_the_split(split):
    rng = np.random.default_rng(0)
    for digit in range(10):
        drawn = {digits.draw_scan(rng, split, digit) for _ in range(30)}
        assert drawn <= set(digits.split_scans(split))
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

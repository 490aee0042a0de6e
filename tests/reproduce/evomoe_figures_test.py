import numpy as np
import pytest

from experiments.reproduce.evomoe_figures import _apart


@pytest.mark.parametrize("heights", [[], [0.3], [0.0, 1.0, 2.0], [0.0, 0.0, 0.01, 0.02, 5.0]])
def test_names_are_moved_apart_but_stay_near_their_points(heights):
    moved = _apart(heights, gap=0.5)
    assert np.all(np.diff(moved) >= 0.5 - 1e-9)
    assert sum(moved) == pytest.approx(sum(heights))
    if np.all(np.diff(heights) >= 0.5):
        assert moved == heights

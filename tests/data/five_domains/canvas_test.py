import numpy as np
import pytest

from anyexperts_jax.data.five_domains.canvas import COLOURS, cluttered_frames, paint


@pytest.mark.parametrize("level", [1, 2, 3])
def test_clutter_is_grey_and_grows_with_the_level(level):
    frames = cluttered_frames(np.random.default_rng(0), 3, 24, 32, level)
    assert frames.shape == (3, 24, 32, 3)
    assert (frames == frames[..., :1]).all()
    bright = (frames[..., 0] >= 70).mean()
    assert {1: bright == 0, 2: 0.005 < bright < 0.03, 3: 0.015 < bright < 0.05}[level]
    assert not (frames[0] == frames[1]).all()


def test_paint_covers_what_is_inside():
    ink = np.full((4, 4), 255, np.uint8)
    ink[0] = 0
    canvas = np.zeros((8, 8, 3), np.uint8)
    covered = paint(canvas, ink, 6, -2, "red")
    expected = np.zeros((8, 8), bool)
    expected[7:, :2] = True
    assert (covered == expected).all()
    assert (canvas[covered] == COLOURS["red"]).all()
    assert (canvas[~covered] == 0).all()


def test_half_ink_mixes_with_what_is_under_it():
    canvas = np.full((2, 2, 3), 100, np.uint8)
    paint(canvas, np.full((2, 2), 51, np.uint8), 0, 0, "yellow")
    assert canvas[0, 0].tolist() == [(51 * c + 204 * 100) // 255 for c in COLOURS["yellow"]]


def test_paint_outside_changes_nothing():
    canvas = np.zeros((8, 8, 3), np.uint8)
    assert not paint(canvas, np.full((4, 4), 255, np.uint8), 0, 9, "red").any()
    assert not canvas.any()

"""Canvases with clutter, and digits painted on them."""

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

COLOURS = {
    "red": (235, 60, 50),
    "green": (50, 205, 70),
    "blue": (70, 110, 255),
    "yellow": (245, 215, 50),
    "purple": (200, 70, 220),
}
COLOUR_NAMES = tuple(COLOURS)
_INK = 96  # a pixel with at least this much ink (of 255) belongs to the digit
_NOISE = {1: 24, 2: 40, 3: 56}  # brightest background pixel, by level
_STROKES_PER_1000_PIXELS = {1: 0, 2: 3, 3: 6}  # grey strokes of clutter, by level
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


def cluttered_canvas(rng: np.random.Generator, height: int, width: int, level: int) -> UInt8[ndarray, "H W 3"]:
    """A dark, noisy background, from level 2 with grey strokes over it."""
    grey = rng.integers(0, _NOISE[level], size=(height, width), dtype=np.uint8)
    for _ in range(_STROKES_PER_1000_PIXELS[level] * height * width // 1000):
        row, column, length, shade, way = rng.integers((0, 0, 3, 70, 0), (height, width, 8, 150, len(_DIRECTIONS)))
        down, right = _DIRECTIONS[way]
        for step in range(length):
            y, x = row + step * down, column + step * right
            if y < height and 0 <= x < width:
                grey[y, x] = shade
    return np.repeat(grey[:, :, None], 3, axis=2)


def paint(
    canvas: UInt8[ndarray, "H W 3"], ink: UInt8[ndarray, "h w"], top: int, left: int, colour: str
) -> Bool[ndarray, "H W"]:
    """Paints `ink` in `colour` on `canvas`, in place, cut at its edges, and returns the pixels it covers."""
    height, width = canvas.shape[:2]
    rows = slice(max(top, 0), min(top + ink.shape[0], height))
    columns = slice(max(left, 0), min(left + ink.shape[1], width))
    covered = np.zeros((height, width), bool)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return covered
    visible = ink[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    alpha = visible[:, :, None].astype(np.int32)
    under = canvas[rows, columns].astype(np.int32)
    canvas[rows, columns] = (alpha * np.asarray(COLOURS[colour]) + (255 - alpha) * under) // 255
    covered[rows, columns] = visible >= _INK
    return covered

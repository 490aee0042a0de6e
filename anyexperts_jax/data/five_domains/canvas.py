"""Makes cluttered backgrounds and paints digits on them."""

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
_LENGTHS = (3, 8)  # range of a stroke's length in pixels, end exclusive
_SHADES = (70, 150)
_DOWN, _RIGHT = np.array([0, 1, 1, 1]), np.array([1, 0, 1, -1])  # a stroke's four directions


def cluttered_frames(
    rng: np.random.Generator, frames: int, height: int, width: int, level: int
) -> UInt8[ndarray, "F H W 3"]:
    """Makes dark, noisy backgrounds, different for every frame; from level 2 on with grey strokes."""
    grey = rng.integers(0, _NOISE[level], size=(frames, height, width), dtype=np.uint8)
    strokes = _STROKES_PER_1000_PIXELS[level] * grey.size // 1000
    if strokes:
        ranges = ((0, frames), (0, height), (0, width), _LENGTHS, _SHADES, (0, len(_DOWN)))
        draws = (rng.integers(low, high, size=(strokes, 1)) for low, high in ranges)
        frame, row, column, length, shade, way = draws
        step = np.arange(_LENGTHS[1])
        y, x = row + step * _DOWN[way], column + step * _RIGHT[way]
        drawn = (step < length) & (y < height) & (x >= 0) & (x < width)
        frame, shade = np.broadcast_to(frame, y.shape), np.broadcast_to(shade, y.shape).astype(np.uint8)
        np.maximum.at(grey, (frame[drawn], y[drawn], x[drawn]), shade[drawn])
    return np.repeat(grey[..., None], 3, axis=-1)


def paint(
    canvas: UInt8[ndarray, "H W 3"], ink: UInt8[ndarray, "h w"], top: int, left: int, colour: str
) -> Bool[ndarray, "H W"]:
    """Paints `ink` in `colour` on `canvas` in place, clipped at the edges; returns the pixels it covers."""
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

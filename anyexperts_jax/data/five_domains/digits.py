"""The handwritten digits of scikit-learn (1797 scans of 8 x 8 pixels, UCI optdigits), split by their place in it."""

import functools

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import require_one_of

GLYPH = 16  # height and width of a glyph in pixels: the scans at twice their size
# Indices, the ends exclusive. The file lists the scans writer by writer and names no writer: ranges share no scan, and
# no handwriting but of a writer whom a cut goes through.
_SPLIT_RANGES = {"train": (0, 1437), "validation": (1437, 1617), "test": (1617, 1797)}


def split_range(split: str) -> range:
    """The indices of the scans that belong to `split`."""
    require_one_of("split", split, _SPLIT_RANGES)
    return range(*_SPLIT_RANGES[split])


def label(index: int) -> int:
    """The digit that scan `index` shows."""
    return int(_scans()[1][index])


def draw_scan(rng: np.random.Generator, split: str, digit: int) -> int:
    """The index of a scan of `digit`, one of `split`'s at random."""
    choices = _scans_of(split, digit)
    return int(choices[int(rng.integers(len(choices)))])


@functools.cache
def glyph(index: int) -> UInt8[ndarray, "16 16"]:
    """Scan `index` at twice its size (linear interpolation in whole numbers), ink 0 to 255."""
    ink = _scans()[0][index].astype(np.int32) * 255 // 16
    for axis in (0, 1):
        ink = np.moveaxis(ink, axis, 0)
        before = np.concatenate([ink[:1], ink[:-1]])
        after = np.concatenate([ink[1:], ink[-1:]])
        ink = np.stack([3 * ink + before, 3 * ink + after], axis=1).reshape(2 * len(ink), -1) // 4
        ink = np.moveaxis(ink, 0, axis)
    ink = ink.astype(np.uint8)
    ink.setflags(write=False)
    return ink


@functools.cache
def _scans() -> tuple[UInt8[ndarray, "n 8 8"], Int[ndarray, " n"]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.uint8), data.target


@functools.cache
def _scans_of(split: str, digit: int) -> Int[ndarray, " n"]:
    indices = np.asarray(split_range(split))
    return indices[_scans()[1][indices] == digit]

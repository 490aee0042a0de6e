"""The handwritten digits of scikit-learn (1797 scans of 8 x 8 pixels, UCI optdigits), split by writer."""

import bisect
import functools

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import require_one_of

GLYPH = 16  # height and width of a glyph in pixels: the scans at twice their size
# The file does not name writers, but all copied the same text: its digits start again at each of these scans, where a
# new form begins. 13 people filled in 14 forms, so one of them filled in two. Forms 7 and 11 are most similar (by
# nearest neighbours), and both are in train.
FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
_NUM_SCANS = 1797
_SPLIT_FORMS = {"train": (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11), "validation": (4,), "test": (12, 13)}


def form_of(index: int) -> int:
    """Returns the form that scan `index` was cut from."""
    return bisect.bisect_right(FORM_STARTS, index) - 1


@functools.cache
def split_scans(split: str) -> tuple[int, ...]:
    """Returns the indices of the scans in `split`, which has whole forms, so that splits share no handwriting."""
    require_one_of("split", split, _SPLIT_FORMS)
    return tuple(index for index in range(_NUM_SCANS) if form_of(index) in _SPLIT_FORMS[split])


def label(index: int) -> int:
    """Returns the digit on scan `index`."""
    return int(_scans()[1][index])


def draw_scan(rng: np.random.Generator, split: str, digit: int) -> int:
    """Draws the index of a scan of `digit` in `split`."""
    choices = _scans_of(split, digit)
    return int(choices[int(rng.integers(len(choices)))])


@functools.cache
def glyph(index: int) -> UInt8[ndarray, "16 16"]:
    """Returns scan `index` at twice its size (linear interpolation in integers), with ink from 0 to 255."""
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
    indices = np.asarray(split_scans(split))
    return indices[_scans()[1][indices] == digit]

"""The domain general: handwritten digits on a canvas. Which digit, where, how many, what colour?"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from anyexperts_jax.data.domain import example_generator
from anyexperts_jax.data.example import LEVELS, Example
from anyexperts_jax.data.five_domains import digits
from anyexperts_jax.data.five_domains.canvas import COLOUR_NAMES, cluttered_frames, paint
from anyexperts_jax.data.five_domains.marked_text import marked

SIZE = 48  # height and width of the picture: three by three cells of one glyph
PLACES = ("nw", "n", "ne", "w", "mid", "e", "sw", "s", "se")  # of the cells, row by row
_JITTER = {1: 0, 2: 1, 3: 3}  # largest offset of a digit from its cell in pixels, by level
_DIGITS = {1: (1, 1), 2: (2, 3), 3: (4, 5)}  # least and most digits in the picture, by level
_COUNTS = {1: (1, 4), 2: (1, 4), 3: (1, 5)}  # least and most digits to count, by level
_OTHERS = {1: (0, 0), 2: (1, 3), 3: (3, 4)}  # least and most digits that do not count, by level


@dataclasses.dataclass(frozen=True)
class _Placed:
    scan: int
    cell: int
    colour: str

    @property
    def digit(self) -> int:
        return digits.label(self.scan)


class General:
    """Digits in a picture of 48 x 48 pixels.

    Level 1 shows one digit (or, to count, up to four) on its cell of a three by three grid; level 2 two or three, the
    question naming one by its colour or its digit, with clutter; level 3 more digits off their cells, more clutter.
    """

    name = "general"
    question_types = ("which", "where", "count", "colour")
    metric: Literal["exact"] = "exact"

    def example(self, split: str, index: int, seed: int = 0, levels: Sequence[int] = LEVELS) -> Example:
        rng, level = example_generator(self.name, split, index, seed, levels)
        kind = self.question_types[int(rng.integers(len(self.question_types)))]
        if kind == "count":
            placed, asked, question = _counting_scene(rng, split, level)
            answer = str(len(asked))
        else:
            placed = _scene(rng, split, level)
            asked = placed[:1]
            question, answer = _ask(kind, asked[0], named=level > 1)
        image = cluttered_frames(rng, 1, SIZE, SIZE, level)[0]
        evidence = np.zeros((SIZE, SIZE), bool)
        for item in placed:
            covered = _paint(rng, image, item, _JITTER[level])
            evidence = evidence | covered if item in asked else evidence & ~covered
        text, spans = marked(question)
        return Example(
            domain=self.name,
            question_type=kind,
            level=level,
            question=text,
            answer=answer,
            source=" ".join(f"digit:{item.scan}" for item in placed),
            image=image,
            question_evidence=spans,
            image_evidence=evidence,
        )


def _scene(rng: np.random.Generator, split: str, level: int) -> list[_Placed]:
    """Draws digits that differ in value, colour and cell; the question is about the first one."""
    number = _between(rng, _DIGITS[level])
    values, cells, colours = rng.permutation(10), rng.permutation(len(PLACES)), rng.permutation(len(COLOUR_NAMES))
    return [
        _Placed(digits.draw_scan(rng, split, int(values[i])), int(cells[i]), COLOUR_NAMES[colours[i]])
        for i in range(number)
    ]


def _ask(kind: str, item: _Placed, *, named: bool) -> tuple[str, str]:
    """Returns the question about one digit, with its evidence marked, and the answer."""
    if kind == "which":
        return f"which digit is [{item.colour}]?" if named else "which digit is it?", str(item.digit)
    if kind == "where":
        return f"where is the [{item.digit}]?" if named else "where is the digit?", PLACES[item.cell]
    return f"what colour is the [{item.digit}]?" if named else "what colour is it?", item.colour


def _counting_scene(rng: np.random.Generator, split: str, level: int) -> tuple[list[_Placed], list[_Placed], str]:
    """Returns all digits, the ones to count, and the question."""
    number, others = _between(rng, _COUNTS[level]), _between(rng, _OTHERS[level])
    cells = rng.permutation(len(PLACES))
    colour, *other_colours = (COLOUR_NAMES[i] for i in rng.permutation(len(COLOUR_NAMES)))
    placed = []
    for i in range(number + others):
        scan = digits.draw_scan(rng, split, int(rng.integers(10)))
        shade = colour if i < number else other_colours[int(rng.integers(len(other_colours)))]
        placed.append(_Placed(scan, int(cells[i]), shade))
    question = "how many digits?" if level == 1 else f"how many are [{colour}]?"
    return placed, placed[:number], question


def _paint(rng: np.random.Generator, image: np.ndarray, item: _Placed, jitter: int) -> np.ndarray:
    """Paints a digit on its cell, moved by up to `jitter` pixels within the picture; returns the pixels it covers."""
    row, column = divmod(item.cell, SIZE // digits.GLYPH)
    down, right = rng.integers(-jitter, jitter + 1, size=2)
    top = int(np.clip(row * digits.GLYPH + down, 0, SIZE - digits.GLYPH))
    left = int(np.clip(column * digits.GLYPH + right, 0, SIZE - digits.GLYPH))
    return paint(image, digits.glyph(item.scan), top, left, item.colour)


def _between(rng: np.random.Generator, least_and_most: tuple[int, int]) -> int:
    return int(rng.integers(least_and_most[0], least_and_most[1] + 1))

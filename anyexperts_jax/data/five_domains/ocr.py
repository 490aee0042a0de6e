"""The domain ocr: text in matplotlib's fonts, on signs, tables, receipts and bar charts.

Three question types: `read` (the text of a sign), `find` (the value of a row or bar, the price of an item) and
`compare` (the largest, the smallest, how many above a number). Level 1 has single large characters in black on white,
each in a quarter of the picture, on signs and in tables of two rows; level 2 has charts as well; level 3 has receipts
and charts in the smallest readable print, coloured, off the grid and noisy. The splits share no family of fonts.

Examples are exactly reproducible for a given version of Pillow: its bundled FreeType draws the glyphs, and all else is
integer arithmetic.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from anyexperts_jax.data import documents
from anyexperts_jax.data.documents import Document, Style
from anyexperts_jax.data.domain import Metric, example_generator
from anyexperts_jax.data.example import LEVELS, Example
from anyexperts_jax.data.five_domains.marked_text import marked
from anyexperts_jax.data.fonts import FACES

_PLAIN = ((255, 255, 255), (0, 0, 0), (120, 160, 220))  # paper, ink, accent
_COLOURED = (
    _PLAIN,
    ((255, 250, 235), (70, 40, 20), (225, 150, 90)),
    ((235, 245, 255), (10, 30, 90), (100, 150, 230)),
    ((238, 250, 238), (15, 65, 35), (110, 185, 120)),
    ((252, 238, 245), (90, 15, 60), (225, 130, 175)),
)


@dataclasses.dataclass(frozen=True)
class _Difficulty:
    """The choices of one level."""

    palette: tuple[tuple[documents.Colour, documents.Colour, documents.Colour], ...]
    shift: int  # largest offset of the text from its cells in pixels, either way
    noise: int  # largest change of a pixel, either way
    sign_cell: tuple[int, int]
    sign_grid: int  # pixels between the possible places of a sign
    sign_characters: int
    rows: int
    value_digits: int
    kinds: tuple[str, ...]  # kinds of documents for `find`; `compare` uses them without receipts
    everything: bool  # whether to include words on signs, and questions of how many are above a number


_DIFFICULTIES = {
    1: _Difficulty(
        (_PLAIN,),
        shift=0,
        noise=0,
        sign_cell=(32, 32),
        sign_grid=32,
        sign_characters=1,
        rows=2,
        value_digits=1,
        kinds=("table",),
        everything=False,
    ),
    2: _Difficulty(
        _COLOURED,
        shift=1,
        noise=6,
        sign_cell=(20, 24),
        sign_grid=1,
        sign_characters=2,
        rows=3,
        value_digits=2,
        kinds=("table", "chart"),
        everything=False,
    ),
    3: _Difficulty(
        _COLOURED,
        shift=2,
        noise=12,
        sign_cell=(16, 20),
        sign_grid=1,
        sign_characters=3,
        rows=4,
        value_digits=2,
        kinds=("table", "chart", "receipt"),
        everything=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Ocr:
    name: str = "ocr"
    question_types: tuple[str, ...] = ("read", "find", "compare")
    metric: Metric = "anls"

    def example(self, split: str, index: int, seed: int = 0, levels: Sequence[int] = LEVELS) -> Example:
        """See `Domain.example`. The image is 64 x 64, so that a patch of 8 pixels is about one small character.

        Raises:
          UserError: if matplotlib's fonts are missing, or an argument is out of range.
        """
        rng, level = example_generator(self.name, split, index, seed, levels)
        difficulty = _DIFFICULTIES[level]
        style = _style(rng, split, difficulty)
        question_type = self.question_types[int(rng.integers(len(self.question_types)))]
        make = {"read": _read, "find": _find, "compare": _compare}[question_type]
        document, question, answer, boxes = make(rng, style, difficulty)
        question, spans = marked(question)
        return Example(
            domain=self.name,
            question_type=question_type,
            level=level,
            question=question,
            answer=answer,
            source=f"font:{style.face}",
            image=_add_noise(rng, document.image, difficulty.noise),
            question_evidence=spans,
            image_evidence=documents.pixels_in(boxes),
        )


_Made = tuple[
    Document, str, str, list[documents.Box]
]  # document, question with evidence marked, answer, boxes of the answer


def _read(rng: np.random.Generator, style: Style, difficulty: _Difficulty) -> _Made:
    width, height = difficulty.sign_cell
    number = _digits(rng, difficulty.sign_characters)
    text = str(rng.choice(documents.ITEMS)) if difficulty.everything and rng.integers(2) else number
    left = _place(rng, documents.SIDE - width * len(text), difficulty.sign_grid)
    top = _place(rng, documents.SIDE - height, difficulty.sign_grid)
    document = documents.sign(style, text, difficulty.sign_cell, left, top)
    return document, "What does it say?", text, [document.fields[0].value_box]


def _find(rng: np.random.Generator, style: Style, difficulty: _Difficulty) -> _Made:
    kind = difficulty.kinds[int(rng.integers(len(difficulty.kinds)))]
    document = _draw(rng, style, difficulty, kind)
    field = document.fields[int(rng.integers(len(document.fields)))]
    question = f"Price of [{field.key}]?" if kind == "receipt" else f"Value of [{field.key}]?"
    return document, question, field.value, [field.value_box]


def _compare(rng: np.random.Generator, style: Style, difficulty: _Difficulty) -> _Made:
    kinds = [kind for kind in difficulty.kinds if kind != "receipt"]
    kind = kinds[int(rng.integers(len(kinds)))]
    document = _draw(rng, style, difficulty, kind)
    boxes = [box for field in document.fields for box in (field.value_box, field.bar_box) if box is not None]
    values = [int(field.value) for field in document.fields]
    if difficulty.everything and rng.integers(2):
        bound = values[int(rng.integers(len(values)))] - int(rng.integers(2))  # one of them, or just below it
        return document, f"How many above [{bound}]?", str(sum(value > bound for value in values)), boxes
    largest = bool(rng.integers(2))
    chosen = document.fields[int(np.argmax(values) if largest else np.argmin(values))]
    question = f"Which is [{'largest' if largest else 'smallest'}]?"
    return document, question, chosen.key, [*boxes, chosen.key_box]


def _draw(rng: np.random.Generator, style: Style, difficulty: _Difficulty, kind: str) -> Document:
    """Draws a document with distinct keys and distinct values, in alphabetical order if the keys are letters."""
    rows = difficulty.rows
    if kind == "receipt":
        items = rng.permutation(len(documents.ITEMS))[:rows]
        prices = _distinct(rng, 10, 99, rows)
        return documents.receipt(style, [(documents.ITEMS[i], str(p)) for i, p in zip(items, prices, strict=True)])
    letters = sorted(documents.LETTERS[i] for i in rng.permutation(len(documents.LETTERS))[:rows])
    if kind == "chart":
        return documents.chart(style, list(zip(letters, _distinct(rng, 1, 9, rows), strict=True)))
    low, high = (1, 9) if difficulty.value_digits == 1 else (10, 99)
    values = _distinct(rng, low, high, rows)
    return documents.table(style, [(k, str(v)) for k, v in zip(letters, values, strict=True)])


def _style(rng: np.random.Generator, split: str, difficulty: _Difficulty) -> Style:
    face = FACES[split][int(rng.integers(len(FACES[split])))]
    paper, ink, accent = difficulty.palette[int(rng.integers(len(difficulty.palette)))]
    across, down = (int(rng.integers(-difficulty.shift, difficulty.shift, endpoint=True)) for _ in range(2))
    return Style(face, paper, ink, accent, (across, down))


def _add_noise(
    rng: np.random.Generator, image: UInt8[ndarray, "side side 3"], noise: int
) -> UInt8[ndarray, "side side 3"]:
    if noise == 0:
        return image
    grain = rng.integers(-noise, noise, size=(*image.shape[:2], 1), endpoint=True)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def _place(rng: np.random.Generator, room: int, grid: int) -> int:
    return grid * int(rng.integers(0, room // grid, endpoint=True))


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(str(digit) for digit in rng.integers(10, size=count))


def _distinct(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    return [int(low + value) for value in rng.permutation(high - low + 1)[:count]]

"""Draws small documents with Pillow (signs, tables, receipts, bar charts) and records where each text is.

Text is set like on a till receipt, one character per cell, whatever the font: columns line up, and only the shapes
differ between fonts.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import require
from anyexperts_jax.data import fonts

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

SIDE = 64  # pixels of a document's side
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive

LETTERS = "ABCDEFGH"
DIGITS = "0123456789"
ITEMS = ("TEA", "BUN", "JAM", "PIE", "EGG", "FIG", "HAM", "NUT", "OAT", "RYE", "SOY", "COD")
_ALPHABET = "".join(sorted({*LETTERS, *DIGITS, *"".join(ITEMS)}))

_BAR_FLOOR = 47  # the row on which the bars of a chart stand


@dataclasses.dataclass(frozen=True)
class Style:
    face: str
    paper: Colour
    ink: Colour
    accent: Colour  # of bars and rules
    offset: tuple[int, int] = (0, 0)  # how far the text is from its cells, across and down


@dataclasses.dataclass(frozen=True)
class Field:
    """One row of a table or receipt, or one bar of a chart."""

    key: str
    value: str
    key_box: Box
    value_box: Box
    bar_box: Box | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    image: UInt8[ndarray, "side side 3"]
    fields: tuple[Field, ...]


class _Page:
    """A canvas for text in cells."""

    def __init__(self, style: Style) -> None:
        from PIL import Image, ImageDraw

        self._style = style
        self._image = Image.new("RGB", (SIDE, SIDE), style.paper)
        self._draw = ImageDraw.Draw(self._image)

    def text(self, text: str, left: int, top: int, cell: tuple[int, int]) -> Box:
        """Draws `text` from a corner, one character per cell (width, height); returns the box of its ink."""
        width, height = cell
        font = _font_for(self._style.face, width, height)
        across, down = self._style.offset
        baseline = top + down + (height + fonts.capital_height(font)) // 2
        boxes = []
        for i, character in enumerate(text):
            ink_left, _, ink_right, _ = font.getbbox(character, anchor="ls")
            x = left + across + i * width + (width - int(ink_right - ink_left)) // 2 - int(ink_left)
            self._draw.text((x, baseline), character, font=font, fill=self._style.ink, anchor="ls")
            boxes.append(self._draw.textbbox((x, baseline), character, font=font, anchor="ls"))
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        return _clip((min(lefts), min(tops), max(rights), max(bottoms)))

    def rule(self, top: int) -> None:
        self._draw.line((2, top, SIDE - 3, top), fill=self._style.accent)

    def bar(self, left: int, top: int, right: int) -> Box:
        self._draw.rectangle((left, top, right - 1, _BAR_FLOOR - 1), fill=self._style.accent)
        return (left, top, right, _BAR_FLOOR)

    def document(self, fields: Sequence[Field]) -> Document:
        return Document(np.array(self._image), tuple(fields))


def sign(style: Style, text: str, cell: tuple[int, int], left: int, top: int) -> Document:
    """One text on empty ground. Its field has no key."""
    page = _Page(style)
    box = page.text(text, left, top, cell)
    return page.document([Field("", text, box, box)])


def table(style: Style, rows: Sequence[tuple[str, str]]) -> Document:
    """Keys of one letter on the left, values on the right, and rules between the rows. Two rows are drawn larger."""
    require(2 <= len(rows) <= 4, f"a table of {len(rows)} rows; it has 2 to 4")
    height = SIDE // len(rows)
    columns = 1 + max(len(value) for _, value in rows)
    width = min(SIDE // columns, height)
    page = _Page(style)
    fields = []
    for i, (key, value) in enumerate(rows):
        top = i * height
        if i:
            page.rule(top)
        key_box = page.text(key, 0, top, (width, height))
        value_box = page.text(value, SIDE - width * len(value), top, (width, height))
        fields.append(Field(key, value, key_box, value_box))
    return page.document(fields)


def receipt(style: Style, rows: Sequence[tuple[str, str]]) -> Document:
    """Items of three letters and their prices, one per line."""
    require(2 <= len(rows) <= 4, f"a receipt of {len(rows)} rows; it has 2 to 4")
    cell = (12, 16)
    page = _Page(style)
    fields = []
    for i, (item, price) in enumerate(rows):
        top = i * cell[1]
        item_box = page.text(item, 0, top, cell)
        price_box = page.text(price, SIDE - cell[0] * len(price), top, cell)
        fields.append(Field(item, price, item_box, price_box))
    return page.document(fields)


def chart(style: Style, bars: Sequence[tuple[str, int]]) -> Document:
    """Bars as high as their values from 1 to 9, the value above each and its letter below."""
    require(2 <= len(bars) <= 4, f"a chart of {len(bars)} bars; it has 2 to 4")
    require(all(1 <= value <= 9 for _, value in bars), f"chart values {[v for _, v in bars]} must be in [1, 9]")
    page = _Page(style)
    column = SIDE // len(bars)
    cell = (min(column, 16), SIDE - _BAR_FLOOR - 1)
    fields = []
    for i, (letter, value) in enumerate(bars):
        left = i * column + (column - cell[0]) // 2
        top = _BAR_FLOOR - 1 - 3 * value
        bar_box = page.bar(i * column + column // 6, top, (i + 1) * column - column // 6)
        value_box = page.text(str(value), left, top - cell[1], cell)
        letter_box = page.text(letter, left, _BAR_FLOOR, cell)
        fields.append(Field(letter, str(value), letter_box, value_box, bar_box))
    return page.document(fields)


def pixels_in(boxes: Sequence[Box]) -> Bool[ndarray, "side side"]:
    """Marks the pixels of a document that are inside any of the boxes."""
    inside = np.zeros((SIDE, SIDE), dtype=bool)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
    return inside


def _font_for(face: str, width: int, height: int) -> "FreeTypeFont":
    """Fills the cell's width but for the thinnest gap, and three quarters of its height."""
    return fonts.fitted_font(face, _ALPHABET, width - 1, height * 3 // 4)


def _clip(box: tuple[float, float, float, float]) -> Box:
    left, top, right, bottom = (min(max(int(edge), 0), SIDE) for edge in box)
    return left, top, right, bottom

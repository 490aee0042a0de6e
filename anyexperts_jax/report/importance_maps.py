"""Pictures of importance on image patches, question text, spectrogram and film strip, with the evidence outlined.

Red is high and blue is low, as in the papers. Each panel has its own scale, printed in its title, because the question
is which tokens stand out. The chart of real experts compares the levels of modalities and layers.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from anyexperts_jax.core.errors import require
from anyexperts_jax.report import style
from anyexperts_jax.report.example_map import ExampleMap
from anyexperts_jax.report.map_panels import draw_audio, draw_image, draw_video, scale_of
from anyexperts_jax.report.style import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # all lengths here are in inches
_COLUMNS = 60  # cells of the question per line
_LINE = 0.21
_TITLE, _STRIP_TITLE, _GAP, _FOOT = 0.3, 0.22, 0.24, 0.4
_PANELS = {"image": (2.0, draw_image), "audio": (2.3, draw_audio), "video": (2.65, draw_video)}


def draw_importance_maps(maps: Sequence[ExampleMap], path: Path) -> Path:
    """Draws examples with the same kind of media, one below the other, into the PNG `path`."""
    require(len(maps) > 0, "no example to draw")
    kinds = {one.example.media for one in maps}
    require(len(kinds) == 1, f"examples with media {kinds} in one picture; draw each kind on its own")
    total = sum(_height(one) for one in maps) + _FOOT
    with style.figure(WIDTH, total, path, painting=True, layout="none") as drawn:
        top = total
        for one in maps:
            _draw_example(drawn, one, maps, top, total)
            top -= _height(one)
        _draw_key(drawn, total, outlines=any(one.example.has_evidence for one in maps))
    return path


def _height(one: ExampleMap) -> float:
    media = _PANELS[one.example.media][0] if one.example.media else 0.0
    return _TITLE + media + _STRIP_TITLE + _lines(one) * _LINE + _GAP


def _lines(one: ExampleMap) -> int:
    return math.ceil(len(_cells(one)) / _COLUMNS)


def _draw_example(drawn: "Figure", one: ExampleMap, maps: Sequence[ExampleMap], top: float, total: float) -> None:
    """Draws the title, media panels and question strip of one example, from `top` (of `total`) down."""
    drawn.text(0.02, (top - 0.1) / total, _title(one), weight="bold", fontsize=9.5, va="top")
    bottom = top - _TITLE
    if one.example.media:
        height, draw = _PANELS[one.example.media]
        bottom -= height
        draw(drawn, (0.0, bottom / total, 1.0, height / total), one, maps)
    strip = _lines(one) * _LINE
    axes = drawn.add_axes((0.02, (bottom - _STRIP_TITLE - strip) / total, 0.96, strip / total))
    _draw_question(axes, one, scale_of([m.question_LQ.mean(axis=0) for m in maps]))


def _title(one: ExampleMap) -> str:
    example = one.example
    said = "" if one.prediction is None else f', model: "{_short(one.prediction)}"'
    where = f"{example.domain} / {example.question_type}, level {example.level}."
    return f'{where}  Answer: "{_short(example.answer)}"{said}'


def _short(text: str, most: int = 36) -> str:
    line = " ".join(text.split())
    kept = line if len(line) <= most else line[: most - 1] + "…"
    return _plain(kept)


def _plain(text: str) -> str:
    """Replaces characters for which matplotlib has no glyph."""
    return "".join(c if c.isprintable() else "·" for c in text).replace("\ufffd", "·")


def _draw_key(drawn: "Figure", total: float, *, outlines: bool) -> None:
    """Draws the legend at the foot of the picture: the colour bar, and the outline of evidence where some is marked."""
    from matplotlib.patches import Rectangle

    place = 0.22 / total
    axes = drawn.add_axes((0.07, place - 0.06 / total, 0.22, 0.12 / total))
    axes.imshow(Scale(0, 1).colours(np.linspace(0, 1, 128)[None]), aspect="auto")
    style.bare(axes)
    drawn.text(0.06, place, "low", ha="right", va="center", fontsize=8.5)
    drawn.text(0.30, place, "high importance", va="center", fontsize=8.5)
    if not outlines:
        return
    box = Rectangle((0.5, place - 0.07 / total), 0.02, 0.14 / total, fill=False, edgecolor=style.EVIDENCE, linewidth=2)
    drawn.add_artist(box)
    drawn.text(0.53, place, "carries the answer (known from how it was made)", va="center", fontsize=8.5)


def _draw_question(axes: "Axes", one: ExampleMap, scale: Scale) -> None:
    """Draws the question as cells coloured by the importance of their tokens; evidence is outlined."""
    from matplotlib.patches import Rectangle

    cells = _cells(one)
    colour_Q4 = scale.colours(one.question_LQ.mean(axis=0))
    for i, (glyph, token) in enumerate(cells):
        row, column = divmod(i, _COLUMNS)
        axes.add_patch(Rectangle((column, row), 1, 0.9, facecolor=colour_Q4[token].tolist(), linewidth=0))
        axes.text(column + 0.5, row + 0.47, glyph, ha="center", va="center", family="DejaVu Sans Mono", fontsize=9)
    evidence_Q = one.tokenizer.encode(one.example.question).overlapping(one.example.question_evidence)
    for start, end in _runs(np.array([evidence_Q[token] for _, token in cells], bool), _COLUMNS):
        row, column = divmod(start, _COLUMNS)
        outline = Rectangle((column, row), end - start, 0.9, fill=False, edgecolor=style.EVIDENCE, linewidth=2)
        axes.add_patch(outline)
    axes.set_xlim(-0.1, _COLUMNS + 0.1)
    axes.set_ylim(_lines(one), -0.1)
    note = f"question, mean of layers, importance {scale}"
    axes.set_title(note, weight="normal", fontsize=8, color=style.FAINT, pad=3)
    style.bare(axes)


def _cells(one: ExampleMap) -> list[tuple[str, int]]:
    """The cells of the question: a glyph and its token's index for every character of every token.

    A further token of the same character, such as the second byte of "é", gets its own cell.
    """
    text, reached = one.example.question, 0
    cells: list[tuple[str, int]] = []
    for token, (start, stop) in enumerate(one.tokenizer.encode(text).offsets_T2.tolist()):
        if start < stop:
            glyphs = [_plain(c) if c.isascii() else "·" for c in text[max(start, reached) : stop]]
            cells += [(glyph, token) for glyph in glyphs or ["·"]]
        reached = max(reached, stop)
    return cells


def _runs(marked_Q: Bool[ndarray, " Q"], columns: int) -> list[tuple[int, int]]:
    """Half-open runs of marked places, split at the end of a line of `columns`."""
    runs: list[tuple[int, int]] = []
    for i in np.nonzero(marked_Q)[0].tolist():
        if runs and runs[-1][1] == i and i % columns:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs

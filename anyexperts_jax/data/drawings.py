"""Draws contact sheets: examples side by side with their evidence, one PNG per kind of media."""

import contextlib
import dataclasses
import pathlib
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from anyexperts_jax.data.example import SAMPLE_RATE, Example
from anyexperts_jax.data.features import HOP, WINDOW, log_mel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbered = tuple[int, Example]  # an example and its index in the split
Span = tuple[int, int]

_EVIDENCE = "#ff7f0e"
_MARK = "#ffd9a8"  # behind evidence in text
_INK, _GREY = "#1a1a1a", "#767676"
_MEL_BANDS = 40
_DPI = 110

# In inches.
_MARGIN = 0.3
_HEADER = 0.45
_FONT = 8  # points
_FAMILY = "DejaVu Sans Mono"
_LINE = 1.5 * _FONT / 72


@dataclasses.dataclass(frozen=True)
class _Sheet:
    """The layout of examples of one kind of media, in inches."""

    columns: int
    width: float  # of the media
    height: float
    draw: Callable[["Axes", Example], None]


@contextlib.contextmanager
def boxes_for_missing_glyphs() -> Iterator[None]:
    """Silences matplotlib's warnings about missing glyphs, which are drawn as boxes, one warning per letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def draw_sheet(examples: Sequence[Numbered], title: str, path: pathlib.Path) -> None:
    """Draws examples of one kind of media into a PNG, with evidence outlined or marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = _sheet(examples[0][1])
    character = _character_width()
    captions = [_caption(number, example, int(sheet.width / character)) for number, example in examples]
    text_height = max(len(lines) for lines in captions) * _LINE
    cell = (sheet.width + _MARGIN, text_height + sheet.height + _MARGIN)
    columns = min(sheet.columns, len(examples))
    rows = -(-len(examples) // columns)
    size = (columns * cell[0] + _MARGIN, rows * cell[1] + _HEADER + _MARGIN)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(_MARGIN / size[0], 1 - 0.3 / size[1], title, fontsize=12, weight="bold", color=_INK, parse_math=False)
    for i, (lines, (_, example)) in enumerate(zip(captions, examples, strict=True)):
        left = _MARGIN + i % columns * cell[0]
        top = _HEADER + _MARGIN / 2 + i // columns * cell[1]
        page = _axes(figure, left, top, sheet.width, text_height)
        page.set(xlim=(0, sheet.width / character), ylim=(text_height / _LINE, 0))
        _write_lines(page, lines)
        if sheet.height > 0:
            sheet.draw(_axes(figure, left, top + text_height, sheet.width, sheet.height), example)
    with boxes_for_missing_glyphs():
        canvas.print_png(path)


def outline(inside: Bool[ndarray, "H W"]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Returns the edges between pixels inside and outside, as segments ((x, y), (x, y)) in `imshow`'s coordinates."""
    padded = np.pad(inside, 1)
    segments = []
    for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        segments.append(((x - 0.5, y - 0.5), (x - 0.5, y + 0.5)))
    for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        segments.append(((x - 0.5, y - 0.5), (x + 0.5, y - 0.5)))
    return segments


@dataclasses.dataclass(frozen=True)
class _Line:
    text: str
    marks: tuple[Span, ...] = ()
    colour: str = _INK
    weight: str = "normal"


def _caption(number: int, example: Example, characters: int) -> list[_Line]:
    """Returns the lines above the media: the kind of question, the question with its evidence marked, the answer."""
    head = f"{example.question_type}, level {example.level}, #{number}"
    question = [
        _Line(text, marks) for text, marks in wrap_marked(example.question, example.question_evidence, characters)
    ]
    return [_Line(head, colour=_GREY), *question, _Line(f"= {example.answer}", weight="bold")]


def wrap_marked(text: str, marks: Sequence[Span], width: int) -> Iterator[tuple[str, tuple[Span, ...]]]:
    """Breaks a text at spaces into lines of at most `width` characters, each with its parts of `marks`."""
    begin = 0
    for line in textwrap.wrap(text, width, drop_whitespace=False, replace_whitespace=False, expand_tabs=False):
        end = begin + len(line)
        shown = [(max(start, begin) - begin, min(stop, end) - begin) for start, stop in marks]
        yield line, tuple((start, stop) for start, stop in shown if start < stop)
        begin = end


def _write_lines(axes: "Axes", lines: Sequence[_Line]) -> None:
    """Writes lines in a monospaced font, on axes whose units are characters and lines."""
    from matplotlib.patches import Rectangle

    axes.axis("off")
    for i, line in enumerate(lines):
        for start, end in line.marks:
            axes.add_patch(Rectangle((start, i + 0.1), end - start, 0.9, color=_MARK, linewidth=0))
        written = axes.text(0, i + 0.75, line.text, color=line.colour, weight=line.weight, parse_math=False)
        written.set(fontsize=_FONT, family=_FAMILY, va="baseline")


def _character_width() -> float:
    """Returns the distance of characters in inches, which hinting rounds to whole pixels."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    sample = "0" * 200
    font = FontProperties(family=_FAMILY, size=_FONT)
    width, _, _ = RendererAgg(_DPI, _DPI, _DPI).get_text_width_height_descent(sample, font, ismath=False)
    return float(width) / _DPI / len(sample)


def _sheet(example: Example) -> _Sheet:
    if example.video is not None:
        frames, height, width, _ = example.video.shape
        strip = frames * width + (frames - 1) * _gap(width)
        return _Sheet(columns=2, width=5.6, height=5.6 * height / strip, draw=_draw_video)
    if example.audio is not None:
        return _Sheet(columns=3, width=3.0, height=1.3, draw=_draw_audio)
    if example.image is not None:
        height, width, _ = example.image.shape
        return _Sheet(columns=6, width=1.7, height=1.7 * height / width, draw=_draw_image)
    return _Sheet(columns=2, width=5.2, height=0.0, draw=lambda axes, example: None)


def _draw_image(axes: "Axes", example: Example) -> None:
    assert example.image is not None
    _show_pixels(axes, example.image, example.image_evidence)


def _draw_video(axes: "Axes", example: Example) -> None:
    """Draws the frames side by side with gaps."""
    assert example.video is not None
    gap = _gap(example.video.shape[2])
    frames = np.pad(example.video, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    strip = np.concatenate(list(frames), axis=1)[:, :-gap]
    evidence = None
    if example.video_evidence is not None:
        padded = np.pad(example.video_evidence, ((0, 0), (0, 0), (0, gap)))
        evidence = np.concatenate(list(padded), axis=1)[:, :-gap]
    _show_pixels(axes, strip, evidence)


def _show_pixels(axes: "Axes", pixels: UInt8[ndarray, "H W 3"], evidence: Bool[ndarray, "H W"] | None) -> None:
    from matplotlib.collections import LineCollection

    axes.imshow(pixels, interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color="#cccccc", linewidth=0.6)
    if evidence is not None:
        for colour, width in (("#00000080", 2.6), (_EVIDENCE, 1.3)):
            lines = LineCollection(outline(evidence), colors=colour, linewidths=width, capstyle="projecting")
            axes.add_collection(lines)


def _draw_audio(axes: "Axes", example: Example) -> None:
    """Draws the log-mel spectrogram over seconds, with a bar below it for each span of evidence."""
    assert example.audio is not None
    mel = log_mel(example.audio, _MEL_BANDS)
    first = (WINDOW - HOP) / 2 / SAMPLE_RATE
    end = first + len(mel) * HOP / SAMPLE_RATE
    axes.imshow(
        mel.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(first, end, 0, _MEL_BANDS),
        vmin=float(np.percentile(mel, 5)),
        vmax=float(mel.max()),
    )
    axes.set_facecolor("black")
    for start, stop in example.audio_evidence:
        axes.plot((start, stop), (-2.2, -2.2), color=_EVIDENCE, linewidth=4, solid_capstyle="butt")
        for edge in (start, stop):
            axes.axvline(edge, color="white", linewidth=0.7, linestyle=(0, (2, 2)))
    axes.set(xlim=(0, len(example.audio) / SAMPLE_RATE), ylim=(-4.4, _MEL_BANDS), yticks=[])
    axes.axhspan(-4.4, 0, color="white")
    axes.tick_params(labelsize=6, colors=_GREY, length=2, pad=1)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _gap(width: int) -> int:
    return max(1, width // 12)


def _axes(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Adds axes at a place in inches from the figure's top left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))

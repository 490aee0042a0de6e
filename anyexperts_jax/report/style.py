"""The common style of all pictures. Figures are made without pyplot, so no global state changes."""

import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from anyexperts_jax.data.drawings import boxes_for_missing_glyphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
INK = "#1f2430"
FAINT = "#8b93a1"
GRID = "#e3e6eb"
EVIDENCE = "#00a37a"  # bluish green: distinct from both ends of the importance scale, also for the colour-blind
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5d5d5d")  # after Okabe and Ito
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,  # users name domains and variants, and may use dollars
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.facecolor": "white",
}


@contextmanager
def figure(width: float, height: float, path: Path, *, painting: bool = False, **options: Any) -> Iterator["Figure"]:
    """A figure of width x height inches in the common style, written to `path` as a PNG when the block ends.

    A chart is written with 256 colours, which halves the file; a painting, whose colours are data, with all.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC), boxes_for_missing_glyphs():
        drawn = Figure(figsize=(width, height), **{"layout": "constrained", **options})
        FigureCanvasAgg(drawn)
        yield drawn
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(drawn, path, painting)


def _save(drawn: "Figure", path: Path, painting: bool) -> None:
    from PIL import Image

    written = io.BytesIO()
    drawn.savefig(written, dpi=DPI, format="png")
    pixels = Image.open(written).convert("RGB")
    kept = pixels if painting else pixels.quantize(256, dither=Image.Dither.NONE)
    kept.save(path, format="PNG", optimize=True)


@dataclasses.dataclass(frozen=True)
class Scale:
    """The colours of importance between two ends: blue low, light middle, red high, as in the papers.

    All colours are light enough for black text. A span below 0.02 is widened around its middle, so that noise does not
    look like signal.
    """

    low: float
    high: float

    @classmethod
    def between(cls, low: float, high: float) -> "Scale":
        middle, half = (low + high) / 2, max((high - low) / 2, 0.01)
        return cls(middle - half, middle + half)

    def colours(self, values: Float[ndarray, "*n"]) -> Float[ndarray, "*n 4"]:
        """RGBA colours; NaN is transparent."""
        from matplotlib.colors import LinearSegmentedColormap

        stops = ["#3b76c4", "#8fb4e3", "#eef0f2", "#f2a58a", "#d8432e"]
        shares = np.clip((values - self.low) / (self.high - self.low), 0, 1)
        colours = np.asarray(LinearSegmentedColormap.from_list("importance", stops)(np.nan_to_num(shares)))
        colours[..., 3] = np.where(np.isnan(values), 0, 1)
        return colours

    def __str__(self) -> str:
        return f"{self.low:.2f} to {self.high:.2f}"


def series(index: int) -> tuple[str, str]:
    """The colour and marker of the index-th line of a chart: lines differ in more than colour."""
    return SERIES[index % len(SERIES)], _MARKERS[index % len(_MARKERS)]


def label(name: str) -> str:
    """A name for a legend. matplotlib leaves out labels that start with an underscore, so a space is put before it."""
    return f" {name}" if name.startswith("_") else name


def bare(axes: "Axes") -> None:
    """Removes ticks and frame, for pictures."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)

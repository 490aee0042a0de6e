"""The text fonts that matplotlib ships (DejaVu, STIX, Computer Modern), one family per split."""

import functools
import importlib.util
import pathlib
from typing import TYPE_CHECKING

from anyexperts_jax.core.errors import UserError, require

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

# File names without .ttf, by family: all cuts of one design in any weight, slant or width, with its sans, monospaced
# and serif variants, whose letters have similar proportions. Display and symbol fonts are left out.
FAMILIES = {
    "DejaVu": (
        *("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSans-BoldOblique"),
        *("DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
        *("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    ),
    "STIX": ("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta"),
    "Computer Modern": ("cmr10", "cmti10", "cmb10", "cmss10", "cmtt10"),
}
SPLIT_FAMILIES = {"train": ("DejaVu",), "validation": ("STIX",), "test": ("Computer Modern",)}
FACES = {split: tuple(face for name in names for face in FAMILIES[name]) for split, names in SPLIT_FAMILIES.items()}

_CAPITAL = "H"
_SMALLEST = 4  # pixels per em


def font_folder() -> pathlib.Path:
    """Returns the folder of matplotlib's TrueType fonts, found without importing it.

    Raises:
      UserError: if matplotlib or its fonts are missing.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("ocr needs the fonts matplotlib ships; install it with: pip install matplotlib")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
    require(folder.is_dir(), f"matplotlib has no fonts in {folder}; reinstall it")
    return folder


@functools.cache
def load_font(face: str, size: int) -> "FreeTypeFont":
    """Loads the face at `size` pixels per em, with Pillow's own layout, which does not depend on other libraries.

    Raises:
      UserError: if matplotlib ships no such face.
    """
    from PIL import ImageFont

    path = font_folder() / f"{face}.ttf"
    require(path.is_file(), f"face={face!r}: matplotlib ships no {path.name}")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def fitted_font(face: str, alphabet: str, width: int, height: int) -> "FreeTypeFont":
    """Loads the face at the largest size at which every character of `alphabet` fits into `width` and `height`.

    Raises:
      UserError: if not even the smallest size fits.
    """
    for size in range(2 * height, _SMALLEST - 1, -1):
        font = load_font(face, size)
        if capital_height(font) <= height and max(_ink_width(font, character) for character in alphabet) <= width:
            return font
    raise UserError(f"face={face!r} does not fit cells of {width} x {height} pixels at {_SMALLEST} pixels to the em")


def capital_height(font: "FreeTypeFont") -> int:
    """Returns the height of a capital letter in pixels."""
    return -int(font.getbbox(_CAPITAL, anchor="ls")[1])


def _ink_width(font: "FreeTypeFont", character: str) -> int:
    left, _, right, _ = font.getbbox(character, anchor="ls")
    return int(right - left)

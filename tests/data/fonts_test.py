import importlib.util
import itertools
import re

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import documents, fonts

FACES = list(itertools.chain.from_iterable(fonts.FACES.values()))


def test_splits_share_no_family():
    """Checked by the names in the files. Matplotlib has three designs, so one split lacks sans and monospaced faces."""
    assert len(set(FACES)) == len(FACES)
    split_of = {}
    for split, faces in fonts.FACES.items():
        for face in faces:
            family, _ = fonts.load_font(face, 12).getname()
            design = "cm" if family.startswith("cm") else re.match("DejaVu|STIX", family)[0]
            assert split_of.setdefault(design, split) == split, (
                f"{face} is of {design}, as a face of {split_of[design]}"
            )
    assert len(split_of) == 3


def test_train_and_test_have_every_kind():
    kinds = {
        "sans": ("DejaVuSans", "cmss"),
        "mono": ("DejaVuSansMono", "cmtt"),
        "serif": ("DejaVuSerif", "cmb", "STIX"),
    }
    for split, faces in fonts.FACES.items():
        for kind, prefixes in kinds.items():
            mono = kind == "mono"
            there = any(face.startswith(prefixes) and ("Mono" in face or "tt" in face) == mono for face in faces)
            assert there or (split == "validation" and kind != "serif")


@pytest.mark.parametrize("face", FACES)
def test_every_face_draws_every_character_differently(face):
    font = fonts.load_font(face, 32)
    drawn = {character: bytes(font.getmask(character)) for character in documents._ALPHABET}
    assert all(any(mask) for mask in drawn.values())
    assert len(set(drawn.values())) == len(drawn)  # a missing character would be drawn as the same empty box


@pytest.mark.parametrize("face", FACES)
def test_a_fitted_font_is_the_largest_that_fits(face):
    alphabet = documents._ALPHABET
    font = fonts.fitted_font(face, alphabet, 11, 12)
    larger = fonts.load_font(face, int(font.size) + 1)

    def fits(font):
        widest = max(font.getbbox(c, anchor="ls")[2] - font.getbbox(c, anchor="ls")[0] for c in alphabet)
        return fonts.capital_height(font) <= 12 and widest <= 11

    assert fits(font)
    assert not fits(larger)


def test_a_missing_font_is_named(monkeypatch):
    with pytest.raises(UserError, match="matplotlib ships no Comic"):
        fonts.load_font("Comic", 12)
    with pytest.raises(UserError, match="does not fit cells of 1 x 1"):
        fonts.fitted_font("DejaVuSans", "W", 1, 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        fonts.font_folder()

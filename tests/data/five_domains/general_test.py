import hashlib
import itertools

import numpy as np
import pytest

from anyexperts_jax.data.domain import SPLITS
from anyexperts_jax.data.five_domains import digits
from anyexperts_jax.data.five_domains.canvas import COLOURS
from anyexperts_jax.data.five_domains.general import PLACES, SIZE, General

GENERAL = General()


@pytest.fixture(scope="module")
def examples():
    return {split: [GENERAL.example(split, i) for i in range(200)] for split in SPLITS}


def scans(example):
    return [int(name.removeprefix("digit:")) for name in example.source.split()]


def colour_of(pixels):
    """Returns the colour whose direction is nearest to that of the pixels' mean."""
    mean = pixels.astype(float).mean(axis=0)
    cosine = {name: mean @ np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
    return max(cosine, key=cosine.__getitem__)


def test_an_example_is_a_function_of_its_arguments(examples):
    for i in (150, 3, 77):
        again, first = GENERAL.example("train", i), examples["train"][i]
        assert (again.question, again.answer, again.source) == (first.question, first.answer, first.source)
        assert (again.image == first.image).all()
        assert (again.image_evidence == first.image_evidence).all()
    assert not (GENERAL.example("train", 3, seed=1).image == examples["train"][3].image).all()


def test_known_pictures():
    """Seed 0 gives these on every machine."""
    text = " ".join(f"{e.question} {e.answer}" for e in (GENERAL.example("train", i) for i in range(4)))
    pixels = b"".join(GENERAL.example("train", i).image.tobytes() for i in range(20))
    assert text == "which digit is blue? 2 what colour is the 4? green where is the 4? s which digit is yellow? 6"
    assert hashlib.sha256(pixels).hexdigest()[:16] == "7a04b81dc5945382"


def test_splits_share_no_digit(examples):
    used = {split: {scan for example in listed for scan in scans(example)} for split, listed in examples.items()}
    for split in SPLITS:
        assert used[split] <= set(digits.split_scans(split))
        assert len(used[split]) > 50


def test_every_type_and_level_occurs(examples):
    seen = {(e.question_type, e.level) for e in examples["train"]}
    assert seen == set(itertools.product(GENERAL.question_types, (1, 2, 3)))
    assert {GENERAL.example("test", i, levels=(3, 1)).level for i in range(20)} == {1, 3}


def test_difficulty_is_graded(examples):
    for kind in GENERAL.question_types:
        shown = [
            np.mean([len(scans(e)) for e in examples["train"] if (e.question_type, e.level) == (kind, level)])
            for level in (1, 2, 3)
        ]
        assert shown[0] < shown[1] < shown[2]


def test_answers_follow_from_the_evidence(examples):
    for e in itertools.chain.from_iterable(examples.values()):
        lit = e.image[e.image_evidence]
        assert len(lit) > 20
        assert (np.ptp(lit, axis=1) > 40).mean() > 0.9  # coloured; where ink is thin, clutter shines through
        named = {e.question[start:end] for start, end in e.question_evidence}
        assert len(named) == (0 if e.level == 1 else 1)
        if e.question_type == "colour":
            assert colour_of(lit) == e.answer
        elif e.question_type == "where":
            row, column = np.argwhere(e.image_evidence).mean(axis=0) // digits.GLYPH
            assert PLACES[int(3 * row + column)] == e.answer
        elif e.question_type == "which":
            assert str(digits.label(scans(e)[0])) == e.answer
        if e.question_type in ("which", "count") and named:
            assert {colour_of(lit)} == named
        if e.question_type in ("where", "colour") and named:
            assert named == {str(digits.label(scans(e)[0]))}
            assert len({digits.label(scan) for scan in scans(e)}) == len(
                scans(e)
            )  # the description fits one digit only


def test_digits_that_are_not_asked_for_are_not_evidence(examples):
    for e in itertools.chain.from_iterable(examples.values()):
        strong = np.ptp(e.image.astype(int), axis=2) > 110
        outside = strong & ~e.image_evidence
        others = len(scans(e)) - (int(e.answer) if e.question_type == "count" else 1)
        assert outside.any() == (others > 0)


def test_sizes_fit_the_sequence(examples):
    for e in itertools.chain.from_iterable(examples.values()):
        assert e.image.shape == (SIZE, SIZE, 3)
        assert len(e.question) <= 24
        assert len(e.answer) <= 6

import hashlib
import itertools
import re

import numpy as np
import PIL
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import documents
from anyexperts_jax.data import domain as domains
from anyexperts_jax.data.five_domains import ocr
from anyexperts_jax.data.fonts import FACES

OCR = ocr.Ocr()


@pytest.fixture(scope="module")
def examples():
    return {split: [OCR.example(split, i) for i in range(150)] for split in domains.SPLITS}


def same(a, b):
    return a.question == b.question and a.answer == b.answer and np.array_equal(a.image, b.image)


def test_it_is_the_registered_domain():
    assert isinstance(OCR, domains.Domain)
    assert domains.domain("ocr") == OCR


def test_an_example_is_a_function_of_its_arguments(examples):
    for i in (3, 70, 11):
        assert same(OCR.example("train", i), examples["train"][i])
    assert not same(OCR.example("train", 3, seed=1), examples["train"][3])
    assert not same(OCR.example("test", 3), examples["train"][3])


def test_known_pictures():
    """Seed 0 gives these on every machine with Pillow 13.0.0."""
    if PIL.__version__ != "13.0.0":
        pytest.skip(f"Pillow {PIL.__version__} is not 13.0.0")
    text = " ".join(f"{e.question} {e.answer}" for e in (OCR.example("train", i) for i in range(4)))
    pixels = b"".join(OCR.example(split, i).image.tobytes() for split in domains.SPLITS for i in range(20))
    assert text == "What does it say? 9 What does it say? 2 Which is smallest? C What does it say? 83"
    assert hashlib.sha256(pixels).hexdigest()[:16] == "1ae29fa78c853bb0"


def test_splits_share_no_font(examples):
    used = {split: {example.source for example in listed} for split, listed in examples.items()}
    assert all(not used[a] & used[b] for a, b in itertools.combinations(used, 2))
    for split, sources in used.items():
        assert sources == {f"font:{face}" for face in FACES[split]}


def test_every_type_and_level_occurs(examples):
    seen = {(e.question_type, e.level) for e in examples["train"]}
    assert seen == set(itertools.product(OCR.question_types, (1, 2, 3)))
    assert {OCR.example("train", i, levels=(3,)).level for i in range(5)} == {3}


def test_sizes_fit_the_sequence(examples):
    for example in itertools.chain.from_iterable(examples.values()):
        assert example.image.shape == (64, 64, 3)
        assert len(example.question) <= 24
        assert 1 <= len(example.answer) <= 6
        assert len(example.answer) == 1 or example.level > 1
        assert 4 <= example.image_evidence.sum() < 0.8 * 64 * 64


def drawn(monkeypatch, index, level):
    """Returns an example and the document it was made from."""
    made = []
    for kind in ("sign", "table", "receipt", "chart"):
        draw = getattr(documents, kind)
        monkeypatch.setattr(documents, kind, lambda *a, draw=draw, **k: made.append(draw(*a, **k)) or made[-1])
    example = OCR.example("train", index, levels=(level,))
    monkeypatch.undo()
    assert len(made) == 1
    return example, made[0]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_answers_and_evidence_follow_from_the_document(monkeypatch, level):
    types = set()
    for index in range(60):
        example, document = drawn(monkeypatch, index, level)
        question, answer, fields = example.question, example.answer, document.fields
        marks = [question[start:end] for start, end in example.question_evidence]
        values = {field.key: field.value for field in fields}
        expected = [field.value_box for field in fields]
        if example.question_type == "read":
            assert answer == fields[0].value
            assert not marks
        elif example.question_type == "find":
            key = re.fullmatch(r"(?:Value|Price) of (\w+)\?", question)[1]
            assert answer == values[key]
            assert marks == [key]
            expected = [field.value_box for field in fields if field.key == key]
        else:
            assert marks == [question.rstrip("?").split()[-1]]
            numbers = {key: int(value) for key, value in values.items()}
            expected += [field.bar_box for field in fields if field.bar_box]
            if question.startswith("How many"):
                bound = int(re.fullmatch(r"How many above (\d+)\?", question)[1])
                assert answer == str(sum(number > bound for number in numbers.values()))
            else:
                best = {"Which is largest?": max, "Which is smallest?": min}[question]
                assert answer == best(numbers, key=numbers.get)
                expected += [field.key_box for field in fields if field.key == answer]
        np.testing.assert_array_equal(example.image_evidence, documents.pixels_in(expected))
        types.add(question.split()[0])
    assert {"What", "Value", "Which"} <= types
    assert level < 3 or {"How", "Price"} <= types


def test_the_first_level_has_a_character_to_each_quarter(monkeypatch):
    quarters = set()
    for index in range(40):
        example, document = drawn(monkeypatch, index, 1)
        assert (document.fields[0].key == "") == (example.question_type == "read")
        for field in document.fields:
            for left, top, right, bottom in (field.value_box, field.key_box):
                quarters.add((left // 32, top // 32))
                assert (left // 32, top // 32) == ((right - 1) // 32, (bottom - 1) // 32)
    assert quarters == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_levels_differ_in_noise_and_size_of_print(examples):
    def grain(image):  # the noise of the paper
        return np.median(np.abs(np.diff(image[..., 0].astype(int), axis=1)))

    grains = [[grain(e.image) for e in examples["train"] if e.level == level] for level in (1, 2, 3)]
    assert max(grains[0]) == 0
    assert np.mean(grains[0]) < np.mean(grains[1]) < np.mean(grains[2])
    per_character = [
        np.mean(
            [e.image_evidence.sum() / len(e.answer) for e in examples["train"] if (e.question_type, e.level) == key]
        )
        for key in (("read", 1), ("read", 2), ("read", 3))
    ]
    assert per_character[0] > 1.5 * per_character[1] > 2 * per_character[2]


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="split='dev' is unknown"):
        OCR.example("dev", 0)
    with pytest.raises(UserError, match="seed=-1"):
        OCR.example("train", 0, seed=-1)

import numpy as np
import pytest
from PIL import Image

from anyexperts_jax.data import drawings
from anyexperts_jax.data.example import SAMPLE_RATE, Example

TEXT = {"domain": "toy", "level": 2, "question": "Which is largest, and by how much?", "answer": "A"}


def example(question_type="q", **fields):
    return Example(question_type=question_type, source="toy", **{**TEXT, **fields})


def picture(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def orange(pixels):
    return (pixels[..., 0] > 230) & (abs(pixels[..., 1] - 127) < 30) & (pixels[..., 2] < 60)


def test_outline_of_one_pixel_is_its_four_sides():
    inside = np.zeros((3, 4), bool)
    inside[1, 2] = True
    assert {frozenset(segment) for segment in drawings.outline(inside)} == {
        frozenset({(1.5, 0.5), (1.5, 1.5)}),
        frozenset({(2.5, 0.5), (2.5, 1.5)}),
        frozenset({(1.5, 0.5), (2.5, 0.5)}),
        frozenset({(1.5, 1.5), (2.5, 1.5)}),
    }


def test_outline_skips_edges_between_two_inside_and_closes_at_the_border():
    assert len(drawings.outline(np.ones((2, 3), bool))) == 2 * (2 + 3)
    assert drawings.outline(np.zeros((2, 3), bool)) == []


def test_lines_are_wrapped_at_spaces_with_their_marks():
    text = "Zoe has 12 keys and Max has 7"
    marks = [(8, 10), (20, 23), (28, 29)]
    lines = list(drawings.wrap_marked(text, marks, 15))
    assert "".join(line for line, _ in lines) == text
    assert all(len(line) <= 15 for line, _ in lines)
    assert [line[a:b] for line, spans in lines for a, b in spans] == ["12", "Max", "7"]
    cut = list(drawings.wrap_marked("a" * 10, [(3, 7)], 5))  # a mark across the break continues on the next line
    assert cut == [("aaaaa", ((3, 5),)), ("aaaaa", ((0, 2),))]


def test_image_evidence_is_outlined(tmp_path):
    evidence = np.zeros((16, 16), bool)
    evidence[4:8, 4:12] = True
    image = np.full((16, 16, 3), 255, np.uint8)
    drawings.draw_sheet([(0, example(image=image))], "toy", tmp_path / "without.png")
    drawings.draw_sheet([(0, example(image=image, image_evidence=evidence))], "toy", tmp_path / "with.png")
    assert not orange(picture(tmp_path / "without.png")).any()
    rows, columns = np.nonzero(orange(picture(tmp_path / "with.png")))
    width, height = np.ptp(columns), np.ptp(rows)
    assert width / height == pytest.approx(2.0, rel=0.05)  # 8 pixels by 4
    assert width == pytest.approx(1.7 * 110 / 2, rel=0.05)  # half of 1.7 inches at 110 dots per inch


def test_a_video_is_a_strip_of_its_frames(tmp_path):
    video = np.zeros((4, 8, 8, 3), np.uint8)
    video[:, :, :, 1] = np.array([60, 110, 160, 210])[:, None, None]
    evidence = np.zeros((4, 8, 8), bool)
    evidence[3, 2:6, 2:6] = True
    drawings.draw_sheet([(0, example(video=video, video_evidence=evidence))], "toy", tmp_path / "v.png")
    pixels = picture(tmp_path / "v.png")
    centres = []
    for green in (60, 110, 160, 210):
        here = (pixels == (0, green, 0)).all(axis=2)
        assert here.any()
        centres.append(np.nonzero(here)[1].mean())
    assert np.all(np.diff(centres) > 50)
    assert abs(np.nonzero(orange(pixels))[1].mean() - centres[3]) < 5


def test_audio_evidence_is_a_bar_over_its_seconds(tmp_path):
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, SAMPLE_RATE).astype(np.float32)
    drawings.draw_sheet([(0, example(audio=audio, audio_evidence=((0.25, 0.75),)))], "toy", tmp_path / "a.png")
    marked = orange(picture(tmp_path / "a.png"))
    row = marked[marked.sum(axis=1).argmax()]
    assert row.sum() == pytest.approx(0.5 * 3.0 * 110, abs=4)  # half of 3 inches


def test_evidence_in_the_question_is_underlaid(tmp_path):
    plain = example(question="mark the last word here")
    marked = example(question="mark the last word here", question_evidence=((9, 13),))
    drawings.draw_sheet([(0, plain)], "toy", tmp_path / "plain.png")
    drawings.draw_sheet([(0, marked)], "toy", tmp_path / "marked.png")
    before, after = picture(tmp_path / "plain.png"), picture(tmp_path / "marked.png")
    rows, columns = np.nonzero((before != after).any(axis=2))
    dark = (before[rows.min() : rows.max()] < 120).all(axis=2).any(axis=0)
    # The mark covers `last`: as wide as four characters, letters inside it, a blank column of a space at either side.
    assert np.ptp(columns) + 1 == pytest.approx(4 * drawings._character_width() * 110, abs=1.5)
    assert dark[columns.min() : columns.max()].any()
    assert not dark[columns.min() - 3 : columns.min()].any()
    assert not dark[columns.max() + 2 : columns.max() + 4].any()


def test_dollars_and_many_examples_are_drawn(tmp_path):
    many = [(i, example(question=f"costs $5 or ${i}$?")) for i in range(7)]
    drawings.draw_sheet(many, "toy $5$", tmp_path / "many.png")
    assert picture(tmp_path / "many.png").shape[1] > 2 * 5.2 * 110  # two columns

"""Importance mapped back to where the tokens came from, and its pictures."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.domain import domain
from anyexperts_jax.data.encode import encode
from anyexperts_jax.data.example import SAMPLE_RATE, Example
from anyexperts_jax.report import style
from anyexperts_jax.report.example_map import ExampleMap, lay_out
from anyexperts_jax.report.importance_maps import WIDTH, _runs, draw_importance_maps
from anyexperts_jax.report.map_panels import scale_of
from anyexperts_jax.tokenizers.bytes import BYTES

SPEC = EncodingSpec()
LAYERS = 2


def sound():
    """A sweep of half a second, in place of speech synthesis."""
    t = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    audio = (0.3 * np.sin(2 * np.pi * (300 + 2000 * t) * t)).astype(np.float32)
    return Example(
        "speech", "transcribe", 1, "What is said?", "go $5", "sweep", audio=audio, audio_evidence=((0.1, 0.3),)
    )


def example(kind):
    if kind == "audio":
        return sound()
    return domain({"image": "general", "video": "video", "text": "nlp"}[kind]).example("test", 0)


def map_of(kind, seed=0):
    """Importance equal to the token's position over 1000 in layer 0, random in layer 1."""
    one = example(kind)
    fields = encode(one, SPEC)
    positions_T = np.arange(SPEC.max_length) / 1000
    importance_LT = np.stack([positions_T, np.random.default_rng(seed).random(SPEC.max_length)])
    return lay_out(one, "7", fields["tokens_BT"], fields["modality_BT"], importance_LT, SPEC)


@pytest.mark.parametrize("kind", ["image", "audio", "video", "text"])
def test_every_value_is_mapped_to_its_position(kind):
    one = map_of(kind)
    fields = encode(one.example, SPEC)
    media = int((fields["modality_BT"] != Modality.TEXT).sum())
    np.testing.assert_allclose(one.media_L[0], np.arange(1, 1 + media) / 1000)
    question = len(BYTES.encode(one.example.question))
    np.testing.assert_allclose(one.question_LQ[0], np.arange(1 + media, 1 + media + question) / 1000)


def test_a_patch_lies_over_its_own_pixels():
    one = map_of("video")
    fields = encode(one.example, SPEC)
    frames, height, width, _ = one.example.video.shape
    rows, columns = height // SPEC.patch_size, width // SPEC.patch_size
    assert one.patches_LFRC.shape == (LAYERS, frames, rows, columns)
    # Position p reads row p - 1 of the patches: find the pixels of a patch and check where its importance went.
    frame, row, column = 2, 1, 0
    index = (frame * rows + row) * columns + column
    size = SPEC.patch_size
    pixels = one.example.video[frame, row * size : (row + 1) * size, column * size : (column + 1) * size]
    expected = pixels.reshape(-1).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(fields["patches_BPX"][index], expected, atol=1e-6)
    assert one.patches_LFRC[0, frame, row, column] == pytest.approx((1 + index) / 1000)


def test_chunks_last_as_long_as_their_frames():
    one = map_of("audio")
    assert one.chunk_seconds == pytest.approx(0.04)
    assert one.chunks_LS.shape[1] * one.chunk_seconds == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("kind", ["image", "audio", "video", "text"])
def test_a_picture_has_colours_and_the_right_size(kind, tmp_path):
    path = draw_importance_maps([map_of(kind, 0), map_of(kind, 1)], tmp_path / "maps.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == round(WIDTH * style.DPI)
        assert picture.height > 0.2 * picture.width
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    red, green, blue = pixels.T
    assert ((red - blue > 60) & (red - green > 30)).sum() > 200  # high importance
    assert (blue - red > 60).sum() > 200  # low importance
    evidence = tuple(int(style.EVIDENCE[i : i + 2], 16) for i in (1, 3, 5))
    assert (np.abs(pixels - evidence).max(axis=1) < 12).sum() > 100  # outlines


def test_without_evidence_there_is_no_outline_and_no_key_to_it(tmp_path):
    one = map_of("text")
    unmarked = dataclasses.replace(one, example=dataclasses.replace(one.example, question_evidence=()))
    assert one.example.has_evidence
    assert not unmarked.example.has_evidence
    with Image.open(draw_importance_maps([unmarked], tmp_path / "maps.png")) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    evidence = tuple(int(style.EVIDENCE[i : i + 2], 16) for i in (1, 3, 5))
    assert (np.abs(pixels - evidence).max(axis=1) < 12).sum() == 0


def test_kinds_of_media_do_not_share_a_picture(tmp_path):
    with pytest.raises(UserError, match="draw each kind on its own"):
        draw_importance_maps([map_of("image"), map_of("text")], tmp_path / "maps.png")
    with pytest.raises(UserError, match="no example"):
        draw_importance_maps([], tmp_path / "maps.png")


def test_a_map_without_prediction_and_with_odd_bytes_is_drawn(tmp_path):
    odd = Example("nlp", "read", 1, "price in € or $?\ttab", "ünï$", "made", question_evidence=((9, 10),))
    question = len(BYTES.encode(odd.question))
    one = ExampleMap(odd, None, np.full((1, question), 0.5))
    assert draw_importance_maps([one], tmp_path / "odd.png").stat().st_size > 1000


def test_runs_break_at_line_ends():
    marked_Q = np.zeros(12, bool)
    marked_Q[[0, 1, 3, 4, 5, 6]] = True
    assert _runs(marked_Q, columns=5) == [(0, 2), (3, 5), (5, 7)]


def test_the_scale_ignores_stray_values_and_never_collapses():
    values = np.linspace(0.4, 0.6, 1000)
    values[0] = 0.0
    scale = scale_of([values])
    assert 0.40 < scale.low < 0.41
    assert 0.59 < scale.high < 0.60
    flat = scale_of([np.full(10, 0.5)])
    assert (flat.low, flat.high) == pytest.approx((0.49, 0.51))
    colours = flat.colours(np.array([0.0, 1.0, np.nan]))
    assert colours[0, 2] > colours[0, 0]  # low is blue
    assert colours[1, 0] > colours[1, 2]  # high is red
    assert colours[:, 3].tolist() == [1, 1, 0]

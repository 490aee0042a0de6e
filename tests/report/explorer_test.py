"""The data that the page's script reads agree with the routing and with what the model saw."""

import base64
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from anyexperts_jax.report import explorer
from anyexperts_jax.report.explorer import DROPPED, UNITS, explore, figures, frames_of, question_data
from anyexperts_jax.report.page import _json
from anyexperts_jax.tokenizers.bytes import BYTES
from report.made_up import EXPERTS, LAYERS, SPEC, followed, items

DOMAINS = tuple(items())


def data_of(domain):
    (item,) = items()[domain]
    one = followed(domain, item)
    return one, question_data(one, EXPERTS, SPEC, BYTES)


def unpacked(text):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2").astype(int)


@pytest.mark.parametrize("domain", DOMAINS)
def test_figures_equal_the_routing(domain):
    one, data = data_of(domain)
    found, routing = unpacked(data["figures"]), one.routing
    T = len(one.sequence.tokens_T)
    importance_LT, real_LT, virtual_LT, weight_LT = found[: 4 * LAYERS * T].reshape(4, LAYERS, T)
    np.testing.assert_allclose(importance_LT / UNITS, routing.importance_LBT[:, 0], atol=1 / UNITS)
    np.testing.assert_array_equal(real_LT, routing.real_slots_LBT[:, 0])
    np.testing.assert_array_equal(virtual_LT, routing.virtual_slots_LBT[:, 0])
    np.testing.assert_allclose(weight_LT / UNITS, routing.virtual_weight_LBT[:, 0], atol=1 / UNITS)
    pairs = iter(found[4 * LAYERS * T :].reshape(-1, 2))
    for layer in range(LAYERS):
        for t in range(T):
            slots = [next(pairs) for _ in range(real_LT[layer, t])]
            weights = [weight for _, weight in slots]
            assert weights == sorted(weights, reverse=True)
            served = {int(e): w / UNITS for e, w in slots if e < DROPPED}
            assert served == pytest.approx(routing.experts(layer, 0, t), abs=1 / UNITS)
    assert next(pairs, None) is None


def test_a_slot_without_room_is_marked():
    one, data = data_of("general")
    ids = unpacked(data["figures"])[4 * LAYERS * len(one.sequence.tokens_T) :: 2]
    assert (ids >= DROPPED).sum() == one.routing.dropped == 1


def test_a_real_slot_of_weight_zero_is_not_shown_as_empty():
    one, _ = data_of("text")
    one.routing.weights_LBTK[:] = 0.0
    assert len(figures(one, EXPERTS)) == 4 * one.routing.importance_LBT.size + 2 * one.routing.real_slots_LBT.sum()


@pytest.mark.parametrize("domain", DOMAINS)
def test_blocks_follow_one_another_to_the_end(domain):
    one, data = data_of(domain)
    edges = [edge for block in data["blocks"] for edge in (block["start"], block["stop"])]
    assert edges[0] == 0
    assert edges[-1] == len(one.sequence.tokens_T) == len(data["tokens"])
    assert edges[1:-1:2] == edges[2::2]
    learned = [t for b in data["blocks"] if b.get("learned") for t in range(b["start"], b["stop"])]
    assert learned == np.flatnonzero(one.learned_T).tolist()


def test_a_conversation_is_cut_at_its_turns_and_media():
    _, data = data_of("chat")
    kinds = [(block["kind"], block.get("learned")) for block in data["blocks"]]
    asked, learned, image, audio = ("text", False), ("text", True), ("image", None), ("audio", None)
    assert kinds == [asked, image, asked, image, asked, learned, audio, asked, learned]
    said = ["".join(data["tokens"][b["start"] : b["stop"]]) for b in data["blocks"] if b.get("learned")]
    assert said == ["The first.<eos>", "A sweep: <C3><BC>n<C3><AF>.<eos>"]
    assert data["question"] == "And this?"
    assert len(data["evidence"]) > 4, "of the picture and of the text"


def test_a_picture_is_the_one_that_the_model_sees():
    one, data = data_of("general")
    (block,) = (block for block in data["blocks"] if block["kind"] == "image")
    with Image.open(io.BytesIO(base64.b64decode(block["png"]))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), one.item.image)
    assert (block["frames"], block["rows"], block["columns"]) == (1, 6, 6)


def test_a_video_is_a_strip_of_its_frames():
    one, data = data_of("video")
    (block,) = (block for block in data["blocks"] if block["kind"] == "video")
    assert (block["frames"], block["rows"], block["columns"]) == (4, 2, 2)
    time_P = one.sequence.time_T[block["start"] : block["stop"]]
    np.testing.assert_array_equal(frames_of(one.sequence, 0, time_P, SPEC), one.item.video)
    with Image.open(io.BytesIO(base64.b64decode(block["png"]))) as strip:
        assert strip.size == (4 * 16, 16)


def test_a_sound_has_a_column_per_frame():
    _, data = data_of("speech")
    (block,) = (block for block in data["blocks"] if block["kind"] == "audio")
    with Image.open(io.BytesIO(base64.b64decode(block["png"]))) as picture:
        assert picture.size == ((block["stop"] - block["start"]) * SPEC.frames_per_chunk, SPEC.mel_bands)
        columns = np.asarray(picture)
    assert block["seconds"] == pytest.approx(0.04)
    loudest = columns.argmin(axis=0)
    assert loudest[5] > loudest[40], "a sweep rises, and high frequencies are at the top"


def test_a_document_has_no_question():
    _, data = data_of("text")
    assert (data["question"], data["said"]) == ("", None)


def test_questions_that_do_not_fit_are_left_out_domain_by_domain(monkeypatch):
    every = {name: [followed(name, one, i) for i in range(3)] for name, (one,) in items().items()}
    whole = explore(every, EXPERTS, SPEC, BYTES)
    assert (whole.shown, whole.left_out) == (15, 0)
    assert [one["domain"] for one in whole.data["questions"]] == [name for name in DOMAINS for _ in range(3)]
    monkeypatch.setattr(explorer, "MOST_BYTES", len(_json(whole.data)) // 2)
    half = explore(every, EXPERTS, SPEC, BYTES)
    assert half.shown + half.left_out == 15
    assert 5 <= half.shown < 15
    assert {one["domain"] for one in half.data["questions"] if one["number"] == 0} == set(DOMAINS)


def test_nothing_in_the_data_ends_the_script_element():
    _, data = data_of("chat")
    text = _json(data)
    assert "<" not in text
    assert json.loads(text) == data

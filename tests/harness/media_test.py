"""What the harnesses' model classes share: conversations with media, options of tasks, likelihoods behind pictures."""

import dataclasses
import importlib.util
import re

import numpy as np
import pytest
from pretrained.tiny_omni import MARKS, TEMPLATE
from pretrained.tiny_vl import vl_checkpoint

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.harness.media import conversation_of
from anyexperts_jax.harness.runner import MAX_NEW_TOKENS, Runner, read_options
from anyexperts_jax.models.sample import Sampling
from anyexperts_jax.pretrained.pictures import Video

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 21, 37, 3), np.uint8)
ASKED = [{"role": "user", "content": [{"type": "image", "image": PIXELS[0]}, {"type": "text", "text": "A cat"}]}]


def parts_of(*parts):
    (message,) = conversation_of([{"role": "user", "content": list(parts)}], "mine, document 3")
    return message["content"]


def test_parts_of_conversations():
    text = {"type": "text", "text": "Hello"}
    assert parts_of(text, {"type": "text", "text": " world"}) == "Hello world"
    assert conversation_of([{"role": "user", "content": "Hello"}], "")[0]["content"] == "Hello"
    image, said = parts_of({"type": "image", "url": PIXELS[0]}, text)
    np.testing.assert_array_equal(image["image"], PIXELS[0])
    assert said == text
    assert parts_of({"type": "video", "url": "a.mp4"})[0]["video"] == Video("a.mp4")
    assert parts_of({"type": "audio", "url": "a.wav"})[0] == {"type": "audio", "audio": "a.wav"}
    for kind in ("audio", "video"):  # lmms-eval calls a sound's dictionary a video
        samples = np.linspace(-0.5, 0.5, 160, dtype=np.float32)
        (sound,) = parts_of({"type": kind, "url": {"array": samples, "sampling_rate": 16000}})
        np.testing.assert_array_equal(sound["audio"], samples)
    (stereo,) = parts_of({"type": "audio", "url": {"array": np.stack([samples, -samples]), "sampling_rate": 16000}})
    np.testing.assert_array_equal(stereo["audio"], np.zeros(160))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "smell", "url": "a"}, "a part of type 'smell'; text, image, audio and video"),
        ({"type": "video", "url": {"url": "a.mp4", "video_start": 1.0}}, "a cut of a video"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, "a cut of a video"),
        ({"type": "video", "url": [1, 2]}, "a video as list; only the path"),
        ({"type": "audio", "url": 7}, "a sound as int"),
    ],
)
def test_parts_that_are_not_read(part, message):
    with pytest.raises(UserError, match=f"mine, document 3: {re.escape(message)}"):
        parts_of(part)


def test_options_of_tasks():
    greedy = read_options({}, 512)
    assert greedy == (MAX_NEW_TOKENS, Sampling(), ())
    given = {"max_new_tokens": 16, "temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False}
    assert read_options({**given, "until": ["a", ""], "image_aspect_ratio": "original"}, 99) == (16, Sampling(), ("a",))
    drawn = read_options({"max_gen_toks": 8, "temperature": 0.5, "until": "b"}, 99)
    assert drawn == (8, Sampling(temperature=0.5), ("b",))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 4}, r"asks for num_beams in generation_kwargs \(4\)"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty in generation_kwargs \(1.2\)"),
        ({"visual_cot": True}, "asks for visual_cot in generation_kwargs"),
        ({"max_new_tokens": 99}, "max_new_tokens=99 leaves no room in 99 positions"),
    ],
)
def test_options_that_cannot_be_honoured(asked, message):
    with pytest.raises(UserError, match=message):
        read_options(asked, 99)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    from anyexperts_jax import load_pretrained
    from anyexperts_jax.serve.model import serve_pretrained
    from anyexperts_jax.tokenizers.train import train_tokenizer

    folder = vl_checkpoint(tmp_path_factory.mktemp("hub") / "vl")
    train_tokenizer(["Hello world", "cat on the mat; the cat", "A cat sat"], 300, special=MARKS).save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Runner(serve_pretrained(load_pretrained(folder), "mine"), 2.0, rows=2, length=96)


def test_a_likelihood_behind_a_picture_is_that_of_a_forward_pass(runner):
    from anyexperts_jax import load_pretrained

    model = load_pretrained(runner.model.path)
    answer = model.tokenizer.encode(" sat on").ids_T.tolist()
    prompt = runner.model.reader.conversation(ASKED)
    logprob, likeliest = runner.score_after(prompt, answer)
    ids = [*prompt.tokens, *answer]
    logits_TY = np.asarray(model.logits([ids], budget=2.0, images=[PIXELS[0]]))[0]
    logprobs_TY = logits_TY - np.logaddexp.reduce(logits_TY, axis=1, keepdims=True)
    places = range(len(prompt.tokens) - 1, len(ids) - 1)
    assert logprob == pytest.approx(sum(logprobs_TY[t, ids[t + 1]] for t in places), abs=1e-4)
    assert likeliest == all(logprobs_TY[t].argmax() == ids[t + 1] for t in places)
    assert set(runner.used.by_modality) == {"text", "image"}
    for real_L in (runner.used.by_layer, *runner.used.by_modality.values()):
        assert real_L == pytest.approx([2.0] * 3)


@pytest.mark.slow
def test_answers_are_those_of_generate_and_prompts_are_read_when_a_row_is_free(runner):
    from anyexperts_jax import load_pretrained

    read = []

    def asked():
        for number in range(4):
            read.append(number)
            text = {"type": "text", "text": "A cat"}
            parts = [{"type": "image", "image": PIXELS[number]}, text] if number < 2 else [text]
            prompt = runner.model.reader.conversation([{"role": "user", "content": parts}])
            yield prompt, read_options({"max_new_tokens": 4}, 96)

    answers = runner.answers(asked())
    model = load_pretrained(runner.model.path)
    for number, answer in enumerate(answers):
        parts = [*([{"type": "image"}] if number < 2 else []), {"type": "text", "text": "A cat"}]
        how = {"images": [PIXELS[number]]} if number < 2 else {}
        message = [{"role": "user", "content": parts}]
        assert answer.text == model.generate(message, max_new_tokens=4, budget=2.0, **how)
        assert answer.usage.spent.tokens_M[1] == (0 if number >= 2 else answer.usage.spent.tokens_M[1])
    assert read == [0, 1, 2, 3]
    assert runner.seconds > 0


def test_a_prompt_and_an_answer_that_are_too_long(runner):
    prompt = runner.model.reader.conversation(ASKED)
    with pytest.raises(UserError, match=r"tokens with its media and the answer 120, the model 128 positions"):
        runner.score_after(prompt, [3] * 120)


@pytest.mark.slow
def test_a_run_scores_answers_behind_pictures():
    from evaluate.stand_in import trained

    from anyexperts_jax.evaluate.measure import run_at
    from anyexperts_jax.serve.model import serve_trained

    one = trained()
    runner = Runner(serve_trained(one, "mine"), None)
    prompt = runner.model.reader.conversation(ASKED)
    logprob, _ = runner.score_after(prompt, [70, 71])
    assert set(runner.used.by_modality) == {"text", "image"}
    batch, first = prompt.batch, len(prompt.tokens)
    tokens_1T, valid_1T = np.array(batch.tokens_BT), np.array(batch.valid_BT)
    tokens_1T[0, first], valid_1T[0, first] = 70, True
    position_1T = np.arange(tokens_1T.shape[1])[None]
    whole = dataclasses.replace(batch, tokens_BT=tokens_1T, valid_BT=valid_1T, position_BT=position_1T)
    logits_TY = np.asarray(
        run_at(one, one.config.model, whole, (one.config.model.moe.k_min, one.config.model.moe.k_max)).logits_BTY
    )[0]
    logprobs_TY = logits_TY - np.logaddexp.reduce(logits_TY, axis=1, keepdims=True)
    assert logprob == pytest.approx(logprobs_TY[first - 1, 70] + logprobs_TY[first, 71], abs=1e-4)


def test_without_lmms_eval_the_command_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    from anyexperts_jax.cli.main import main

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lmms_eval" else found(name))
    assert main(["evaluate", str(tmp_path), "--harness", "lmms-eval", "--tasks", "mmmu_val"]) == 2
    said = capsys.readouterr().err
    assert "--harness lmms-eval needs the package lmms_eval in an environment of its own: make lmms-env" in said
    assert main(["evaluate", str(tmp_path), "--harness", "lmms-eval"]) == 2
    assert "--harness: only with --tasks" in capsys.readouterr().err

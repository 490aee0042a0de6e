"""Asks the stand-in's random model one question at a time."""

import dataclasses
import os

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.example import SAMPLE_RATE
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.prepare import prepare
from anyexperts_jax.evaluate.ask import ask, own_example
from evaluate.stand_in import DATA, trained, write_run


@pytest.fixture(scope="module")
def one():
    return trained()


@pytest.fixture(scope="module")
def example():
    return open_source(DATA, "general", "test", 1)[0]


@pytest.mark.slow
def test_the_generated_answer_does_not_depend_on_the_correct_one(one, example):
    reply = ask(one, example)
    assert reply == ask(one, dataclasses.replace(example, answer="x" * len(example.answer)))
    assert reply.window == (3, 6)
    assert set(reply.real_slots) == {"text", "image"}


@pytest.mark.slow
def test_a_larger_budget_gives_every_modality_more_real_experts(one, example):
    low, high = ask(one, example, budget=2.8), ask(one, example, budget=5.2)
    assert low.window == (2, 5)
    assert high.window == (5, 8)
    assert all(low.real_slots[name] + 1 < high.real_slots[name] for name in ("text", "image"))


@pytest.mark.slow
def test_a_users_picture_is_asked_about(one, tmp_path):
    Image.fromarray(np.full((30, 50, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    example = own_example("what is it?", one.config.data.encoding, image=tmp_path / "grey.png")
    assert example.image.shape == (30, 50, 3)  # encoding resizes it later
    assert prepare(example, one.config.data.encoding).image.shape == (32, 48, 3)
    assert set(ask(one, example).real_slots) == {"text", "image"}


def test_a_users_sound_is_resampled_to_our_rate(tmp_path):
    wavfile.write(tmp_path / "a.wav", 2 * SAMPLE_RATE, np.full((400, 2), 2**14, np.int16))
    example = own_example("what is said?", EncodingSpec(), audio=tmp_path / "a.wav")
    assert example.audio.shape == (200,)
    assert example.audio[100] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("dtype", "silence", "half"),
    [(np.uint8, 128, 192), (np.int16, 0, 2**14), (np.int32, 0, 2**30), (np.float32, 0, 0.5)],
)
def test_samples_of_every_wav_type_are_scaled(tmp_path, dtype, silence, half):
    samples = np.repeat(np.array([silence, half], dtype), 200)
    wavfile.write(tmp_path / "a.wav", SAMPLE_RATE, samples)
    audio = own_example("what is said?", EncodingSpec(), audio=tmp_path / "a.wav").audio
    np.testing.assert_allclose(audio, np.repeat([0, 0.5], 200), atol=1e-4)


def test_unreadable_files_are_refused(tmp_path):
    wavfile.write(tmp_path / "empty.wav", SAMPLE_RATE, np.zeros(0, np.int16))
    (tmp_path / "no.png").write_text("not a picture")
    (tmp_path / "no.wav").write_text("not a sound")
    for kwargs, message in (
        ({"image": tmp_path / "no.png"}, "cannot read the picture .*no.png"),
        ({"image": tmp_path / "none.png"}, "cannot read the picture .*none.png"),
        ({"audio": tmp_path / "no.wav"}, "cannot read the sound .*no.wav: .*; it must be a WAV file"),
        ({"audio": tmp_path / "empty.wav"}, "the sound .*empty.wav is empty; give a WAV file with samples in it"),
        ({"audio": tmp_path / "no.wav", "image": tmp_path / "no.png"}, "give --image or --audio, not both"),
    ):
        with pytest.raises(UserError, match=message):
            own_example("what?", EncodingSpec(), **kwargs)
    with pytest.raises(UserError, match="the question is empty"):
        own_example("", EncodingSpec())
    with pytest.raises(UserError, match=r"the question 'caf\\udce9' is not valid UTF-8"):
        own_example(os.fsdecode(b"caf\xe9"), EncodingSpec())
    with pytest.raises(UserError, match=r"reads no images: data\.encoding\.max_patches=0"):
        own_example("what?", EncodingSpec(max_patches=0), image=tmp_path / "no.png")


@pytest.mark.slow
def test_the_command_prints_answers_by_budget(one, tmp_path, capsys):
    run = str(write_run(tmp_path / "run", one))
    assert main(["generate", run, "--domain", "nlp", "--index", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["question", "expected", "answer", "real experts per token"]
    assert lines[0].endswith(open_source(DATA, "nlp", "test", 4)[3].question)
    assert main(["generate", run, "--question", "1 + 1?", "--budget", "99"]) != 0
    assert "99" in capsys.readouterr().err
    assert main(["generate", run, "--index", "-1"]) == 2
    assert capsys.readouterr().err == "anyexperts: --index=-1 must be >= 0\n"

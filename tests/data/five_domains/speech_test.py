import hashlib
import itertools
import pathlib
import re

import espeakng_loader
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import domain as domains
from anyexperts_jax.data import espeak
from anyexperts_jax.data.example import SAMPLE_RATE
from anyexperts_jax.data.five_domains import speech

SPEECH = speech.Speech()


@pytest.fixture(scope="module")
def examples():
    return {split: [SPEECH.example(split, i) for i in range(120)] for split in domains.SPLITS}


def same(a, b):
    return a.question == b.question and a.answer == b.answer and np.array_equal(a.audio, b.audio)


def test_it_is_the_registered_domain():
    assert isinstance(SPEECH, domains.Domain)
    assert domains.domain("speech") == SPEECH


def test_an_example_is_a_function_of_its_arguments(examples):
    for i in (3, 70, 11):  # in another order, after other examples
        assert same(SPEECH.example("train", i), examples["train"][i])
    assert not same(SPEECH.example("train", 3, seed=1), examples["train"][3])
    assert not same(SPEECH.example("test", 3), examples["train"][3])


def test_known_audio():
    """Seed 0 gives these on every machine with eSpeak NG 1.52.0."""
    if espeak.version() != "1.52.0":
        pytest.skip(f"eSpeak NG {espeak.version()} is not 1.52.0")
    audio = np.concatenate([SPEECH.example("train", i).audio for i in range(6)])
    assert hashlib.sha256((audio * 32768).astype("<i2").tobytes()).hexdigest()[:16] == "038fda52e97518d9"


def test_splits_share_no_voice(examples):
    variants = [set(speech.VARIANTS[split]) for split in domains.SPLITS]
    assert all(not a & b for a, b in itertools.combinations(variants, 2))
    for split, listed in examples.items():
        used = {example.source.rpartition("+")[2] for example in listed}
        assert used <= set(speech.VARIANTS[split])
        assert len(used) >= 5


def test_splits_share_no_speaker():
    """Checked in eSpeak's own files: voices of two splits have different names and different formants."""
    split_of = {variant: split for split, families in speech.FAMILIES.items() for variant in sum(families, ())}
    assert len(split_of) == sum(len(variants) for variants in speech.VARIANTS.values())
    vowels = {variant: formants(variant)[:3] for variant in split_of}
    for one, other in itertools.combinations(split_of, 2):
        if split_of[one] != split_of[other]:
            assert re.sub(r"(?<=..)\d+$", "", one).lower() != re.sub(r"(?<=..)\d+$", "", other).lower()
            assert np.abs(vowels[one] - vowels[other]).max() > 5, f"{one} and {other} speak alike"


def formants(variant):
    """Returns the formant frequencies that a variant's file sets, in percent of the default voice's."""
    found = np.full(9, 100.0)
    file = pathlib.Path(espeakng_loader.get_data_path()) / "voices" / "!v" / variant
    for line in file.read_text(errors="replace").splitlines():
        if line.startswith("formant"):
            _, number, percent, *_ = line.split()
            found[int(number)] = float(percent)
    return found[1:]


def test_every_type_and_level_occurs(examples):
    seen = {(e.question_type, e.level) for e in examples["train"]}
    assert seen == set(itertools.product(SPEECH.question_types, (1, 2, 3)))
    assert {SPEECH.example("train", i, levels=(2,)).level for i in range(5)} == {2}


def test_answers_follow_from_the_spoken_text(examples):
    for example in itertools.chain.from_iterable(examples.values()):
        said = example.answer.split()
        assert set(said) <= set(speech.WORDS.values())
        spans = example.audio_evidence
        if example.question_type == "transcribe":
            assert len(said) == len(spans) == example.level
        elif example.question_type == "count":
            assert example.answer == str(len(spans))
        else:
            assert len(said) == len(spans) == 1
            ((start, end),) = example.question_evidence
            assert example.question[start:end] in ("first", "second", "last")


def test_sizes_fit_the_sequence(examples):
    for example in itertools.chain.from_iterable(examples.values()):
        assert len(example.question) <= 24
        assert len(example.answer) <= 16
        assert 0.2 < len(example.audio) / SAMPLE_RATE <= speech.MAX_SECONDS
        assert np.abs(example.audio).max() <= 1.0


def test_the_slowest_longest_utterance_fits():
    said = speech._say(("seven", "zero", "seven", "zero"), "en-gb-scotland+aunty", 150, 50)[0]
    assert len(said) / SAMPLE_RATE < speech.MAX_SECONDS


def test_evidence_holds_the_speech_and_the_rest_is_quiet(examples):
    for example in examples["train"]:
        if example.level == 1 and example.question_type != "position":
            inside = np.zeros(len(example.audio), bool)
            for start, end in example.audio_evidence:
                inside[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] = True
            power = example.audio.astype(np.float64) ** 2
            assert power[inside].mean() > 1000 * power[~inside].mean()  # 40 dB is 10,000


def test_evidence_of_a_position_question_covers_the_word():
    """The evidence span of `seven` in `one seven` resembles `seven` spoken alone more than `one` spoken alone."""
    from anyexperts_jax.data.features import log_mel

    voice = "en-us+m1"
    speech_samples, spans = speech._say(("one", "seven"), voice, 170, 50)
    alone = {word: speech._say((word,), voice, 170, 50)[0] for word in ("one", "seven")}

    def profile(samples):
        return log_mel((samples / 32768).astype(np.float32), 24).mean(axis=0)

    for word, (start, end) in zip(("one", "seven"), spans, strict=True):
        distance = {w: np.abs(profile(speech_samples[start:end]) - profile(alone[w])).mean() for w in alone}
        assert min(distance, key=distance.get) == word


def test_noise_grows_with_the_level():
    loud = []
    for level in (1, 2, 3):
        found = [SPEECH.example("train", i, levels=(level,)) for i in range(20)]
        # The first 20 ms hold noise alone.
        loud.append(np.mean([np.mean(e.audio[:320].astype(np.float64) ** 2) for e in found]))
    assert 4 * loud[0] < loud[1] < loud[2] / 4


def test_resampling_keeps_a_tone():
    tone = np.round(10_000 * np.sin(2 * np.pi * 1000 * np.arange(22_050) / espeak.ESPEAK_RATE)).astype(np.int16)
    resampled = speech._resample(tone)
    expected = 10_000 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / SAMPLE_RATE)
    assert len(resampled) == 16_000
    np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=40)  # 0.4%: the filter's ripple


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="split='dev' is unknown"):
        SPEECH.example("dev", 0)
    with pytest.raises(UserError, match="index=-1"):
        SPEECH.example("train", -1)
    with pytest.raises(UserError, match="level=4 is unknown"):
        SPEECH.example("train", 0, levels=(4,))

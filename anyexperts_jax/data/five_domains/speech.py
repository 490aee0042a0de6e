"""The domain speech: spoken digits and commands, synthesised by eSpeak NG in many voices.

Three question types: `transcribe` (all words), `position` (the first, second or last word) and `count` (how many).
Level 1 is one accent at one rate in a quiet room, and the recording ends with the last word; levels 2 and 3 add words,
accents, rates, pitches, noise, and silence after the words. The splits share no family of voice variants; a variant
sets formants, pitch and timing.

The samples are exactly reproducible: eSpeak's are integers, noise is added in integers, and resampling is rounded to 16
bits.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int16, Int64
from numpy import ndarray

from anyexperts_jax.data import espeak
from anyexperts_jax.data.domain import Metric, example_generator
from anyexperts_jax.data.example import LEVELS, SAMPLE_RATE, Example
from anyexperts_jax.data.five_domains.marked_text import marked

# Spoken words, and how answers write them.
WORDS = {
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "go": "go",
    "stop": "stop",
    "up": "up",
    "down": "down",
}
# Voice variants, grouped by family: they are of one speaker (iven3, iven4), or similar because their first three
# formants, which make a vowel, are within 5% of each other or were copied from each other. The first family is close to
# eSpeak's voice without a variant.
# fmt: off
FAMILIES = {
    "train": (
        (
            "Alex", "Mario", "Nguyen", "anika", "grandpa", "m1", "m3", "m4", "m5", "m6", "m7", "m8", "max", "quincy",
            "rob",
        ),
        ("Michael", "gustave", "marcelo"), ("aunty", "belinda", "linda"), ("f1", "steph", "steph2"), ("grandma",),
    ),
    "validation": (("Andy",), ("Annie",), ("boris",), ("norbert",), ("travis",)),
    "test": (("Andrea",), ("Lee",), ("iven3", "iven4"), ("kaukovalta",), ("shelby",)),
}
# fmt: on
VARIANTS = {split: tuple(itertools.chain.from_iterable(families)) for split, families in FAMILIES.items()}
MAX_SECONDS = 2.4

_POSITIONS = ("first", "second", "last")


@dataclasses.dataclass(frozen=True)
class _Difficulty:
    """The choices of one level; ranges are inclusive."""

    accents: tuple[str, ...]
    words_per_minute: tuple[int, int]
    pitch: tuple[int, int]
    before_ms: tuple[int, int]  # of only noise, before the words
    after_ms: tuple[int, int]  # of only noise, after the words
    gain_percent: tuple[int, int]
    noise_db: tuple[int, int]  # below the speech
    transcribe: tuple[int, int]  # how many words, by question type
    position: tuple[int, int]
    count: tuple[int, int]


_DIFFICULTIES = {
    1: _Difficulty(
        accents=("en-us",),
        words_per_minute=(170, 170),
        pitch=(50, 50),
        before_ms=(40, 200),
        after_ms=(0, 0),
        gain_percent=(80, 80),
        noise_db=(40, 40),
        transcribe=(1, 1),
        position=(2, 2),
        count=(1, 2),
    ),
    2: _Difficulty(
        accents=("en-us", "en-us-nyc", "en-gb-x-rp"),
        words_per_minute=(150, 190),
        pitch=(42, 58),
        before_ms=(20, 240),
        after_ms=(20, 240),
        gain_percent=(60, 90),
        noise_db=(24, 36),
        transcribe=(2, 2),
        position=(2, 3),
        count=(1, 3),
    ),
    3: _Difficulty(
        accents=("en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-gb-scotland", "en-029"),
        words_per_minute=(150, 220),
        pitch=(35, 65),
        before_ms=(20, 360),
        after_ms=(20, 360),
        gain_percent=(40, 95),
        noise_db=(8, 20),
        transcribe=(3, 3),
        position=(3, 3),
        count=(2, 4),
    ),
}


@dataclasses.dataclass(frozen=True)
class Speech:
    name: str = "speech"
    question_types: tuple[str, ...] = ("transcribe", "position", "count")
    metric: Metric = "wer"

    def example(self, split: str, index: int, seed: int = 0, levels: Sequence[int] = LEVELS) -> Example:
        """See `Domain.example`. The audio is at most MAX_SECONDS long.

        Raises:
          UserError: if eSpeak NG cannot be used, or an argument is out of range.
        """
        rng, level = example_generator(self.name, split, index, seed, levels)
        difficulty = _DIFFICULTIES[level]
        question_type = _choose(rng, self.question_types)
        words = [_choose(rng, tuple(WORDS)) for _ in range(_draw(rng, getattr(difficulty, question_type)))]
        voice = f"{_choose(rng, difficulty.accents)}+{_choose(rng, VARIANTS[split])}"
        rate, pitch = _draw(rng, difficulty.words_per_minute), _draw(rng, difficulty.pitch)
        speech, spans = _say(tuple(words), voice, rate, pitch)
        audio, offset = _in_a_room(rng, speech, difficulty)
        question, answer, asked = _ask(rng, question_type, words)
        question, marks = marked(question)
        return Example(
            domain=self.name,
            question_type=question_type,
            level=level,
            question=question,
            answer=answer,
            source=f"voice:{voice}",
            audio=audio,
            question_evidence=marks,
            audio_evidence=tuple(
                ((offset + spans[i][0]) / SAMPLE_RATE, (offset + spans[i][1]) / SAMPLE_RATE) for i in asked
            ),
        )


def _ask(rng: np.random.Generator, question_type: str, words: list[str]) -> tuple[str, str, list[int]]:
    """Returns the question with its evidence marked, the answer, and the indices of the words that carry it."""
    everything = list(range(len(words)))
    if question_type == "transcribe":
        return "What is said?", " ".join(WORDS[word] for word in words), everything
    if question_type == "count":
        return "How many words?", str(len(words)), everything
    position = _choose(rng, _POSITIONS if len(words) > 2 else ("first", "last"))
    asked = {"first": 0, "second": 1, "last": len(words) - 1}[position]
    return f"What is the [{position}] word?", WORDS[words[asked]], [asked]


def _say(
    words: tuple[str, ...], voice: str, words_per_minute: int, pitch: int
) -> tuple[Int16[ndarray, " samples"], list[tuple[int, int]]]:
    """Speaks the words at SAMPLE_RATE, without silence around them; also returns the samples of each word."""
    said = espeak.speak(" ".join(words), voice, words_per_minute=words_per_minute, pitch=pitch)
    loud = np.flatnonzero(np.abs(said.samples.astype(np.int32)) > np.abs(said.samples.astype(np.int32)).max() // 50)
    first, end = int(loud[0]), int(loud[-1]) + 1
    speech = _resample(said.samples[first:end])
    starts = [max(0, start - first) * SAMPLE_RATE // espeak.ESPEAK_RATE for start in said.word_starts]
    return speech, list(zip(starts, [*starts[1:], len(speech)], strict=True))


def _resample(samples: Int16[ndarray, " before"]) -> Int16[ndarray, " after"]:
    """Resamples from eSpeak's rate to SAMPLE_RATE, rounded to 16 bits to hide differences between machines."""
    from scipy.signal import resample_poly

    up, down = 320, 441  # SAMPLE_RATE / ESPEAK_RATE
    resampled = resample_poly(samples.astype(np.float64), up, down, window=_low_pass())
    return np.clip(np.round(resampled), -32768, 32767).astype(np.int16)


@functools.cache
def _low_pass() -> Float64[ndarray, " taps"]:
    from scipy.signal import firwin

    return firwin(2 * 10 * 441 + 1, 1 / 441, window=("kaiser", 5.0))


def _in_a_room(
    rng: np.random.Generator, speech: Int16[ndarray, " samples"], difficulty: _Difficulty
) -> tuple[Float32[ndarray, " padded"], int]:
    """Scales the speech and adds noise to and around it; also returns the sample at which the speech begins.

    Everything is an integer until the division at the end.
    """
    room = int(MAX_SECONDS * SAMPLE_RATE) - len(speech)
    before = min(_draw(rng, difficulty.before_ms) * SAMPLE_RATE // 1000, room // 2)
    after = min(_draw(rng, difficulty.after_ms) * SAMPLE_RATE // 1000, room // 2)
    peak = int(np.abs(speech.astype(np.int64)).max())
    scaled = speech.astype(np.int64) * (32767 * _draw(rng, difficulty.gain_percent) // 100) // peak
    mean_square = int((scaled**2).sum()) // len(scaled)
    ratio_ppm = round(10 ** (_draw(rng, difficulty.noise_db) / 10 + 6))
    noise_square = mean_square * 10**6 // ratio_ppm
    audio = _noise(rng, before + len(speech) + after, noise_square)
    audio[before : before + len(speech)] += scaled
    return (np.clip(audio, -32768, 32767) / 32768).astype(np.float32), before


def _noise(rng: np.random.Generator, samples: int, mean_square: int) -> Int64[ndarray, " samples"]:
    """Draws uniform white noise; the mean square of the integers -a..a is a (a + 1) / 3."""
    bound = max(1, math.isqrt(3 * mean_square))
    return rng.integers(-bound, bound, size=samples, endpoint=True)


def _draw(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1], endpoint=True))


def _choose(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]

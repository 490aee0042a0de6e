"""The domain video: handwritten digits that appear and move over six frames. Which digit, when, which way?"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from anyexperts_jax.data.domain import example_generator
from anyexperts_jax.data.example import LEVELS, Example
from anyexperts_jax.data.five_domains import digits
from anyexperts_jax.data.five_domains.canvas import COLOUR_NAMES, cluttered_frames, paint
from anyexperts_jax.data.five_domains.marked_text import marked

FRAMES = 6
SIZE = 24  # height and width of a frame
TIMES = ("start", "middle", "end")
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (down, right) per step
_THIRDS = {"start": (0, 2), "middle": (2, 4), "end": (4, 6)}  # (first frame, end) of the times in questions
_FREE = SIZE - digits.GLYPH  # pixels by which a glyph can move within a frame


@dataclasses.dataclass(frozen=True)
class _Actor:
    """A digit that is in the picture from frame `first` to before frame `end`."""

    scan: int
    colour: str
    first: int
    end: int
    top: int  # its position at `first`, in pixels
    left: int
    step: tuple[int, int] = (0, 0)  # pixels (down, right) per frame

    @property
    def digit(self) -> int:
        return digits.label(self.scan)


class Video:
    """Digits in six frames of 24 x 24 pixels, one at a time.

    Level 1 shows one digit; level 2 two digits one after the other, the question naming one by its colour; level 3
    two digits named by order or by value. Strokes that flicker are the clutter of levels 2 and 3.
    """

    name = "video"
    question_types = ("which", "when", "way")
    metric: Literal["exact"] = "exact"

    def example(self, split: str, index: int, seed: int = 0, levels: Sequence[int] = LEVELS) -> Example:
        rng, level = example_generator(self.name, split, index, seed, levels)
        kind = self.question_types[int(rng.integers(len(self.question_types)))]
        actors, answers = _when_scene(rng, split, level) if kind == "when" else _scene(rng, split, level, kind)
        asked = int(rng.integers(len(actors)))
        text, spans = marked(_ask(kind, level, actors, asked))
        video, evidence = _film(rng, actors, actors[asked], level)
        return Example(
            domain=self.name,
            question_type=kind,
            level=level,
            question=text,
            answer=answers[asked],
            source=" ".join(f"digit:{actor.scan}" for actor in actors),
            video=video,
            question_evidence=spans,
            video_evidence=evidence,
        )


def _ask(kind: str, level: int, actors: list[_Actor], asked: int) -> str:
    """Returns the question about one actor, with its evidence marked."""
    colour, digit = actors[asked].colour, actors[asked].digit
    if kind == "which":
        by_order = ("first", "last")[asked] if level == 3 else ""
        return {1: "which digit is it?", 2: f"which digit is [{colour}]?", 3: f"which digit is [{by_order}]?"}[level]
    if kind == "when":
        return {1: "when is the digit?", 2: f"when is it [{colour}]?", 3: f"when is the [{digit}]?"}[level]
    return {1: "which way?", 2: f"which way is [{colour}]?", 3: f"which way is the [{digit}]?"}[level]


def _scene(rng: np.random.Generator, split: str, level: int, kind: str) -> tuple[list[_Actor], list[str]]:
    """Draws one actor, or two for half of the film each, and the answer about each."""
    half = FRAMES // 2
    spans = [(0, half), (half, FRAMES)]
    if level == 1:
        first = int(rng.integers(half + 1))
        spans = [(0, FRAMES) if kind == "way" else (first, first + half)]
    values, colours, ways = rng.permutation(10), rng.permutation(len(COLOUR_NAMES)), rng.permutation(len(WAYS))
    actors, answers = [], []
    for i, (first, end) in enumerate(spans):
        scan, colour = digits.draw_scan(rng, split, int(values[i])), COLOUR_NAMES[colours[i]]
        if kind == "which":
            top, left = (int(x) for x in rng.integers(0, 2, size=2) * _FREE)  # on the grid of patches
            actors.append(_Actor(scan, colour, first=first, end=end, top=top, left=left))
            answers.append(str(actors[-1].digit))
        else:
            way = tuple(WAYS)[ways[i]]
            actors.append(_walk(rng, scan, colour, first=first, end=end, way=way))
            answers.append(way)
    return actors, answers


def _when_scene(rng: np.random.Generator, split: str, level: int) -> tuple[list[_Actor], list[str]]:
    """Draws one or two actors, each in its own third of the film, and the answer about each."""
    values, colours, times = rng.permutation(10), rng.permutation(len(COLOUR_NAMES)), rng.permutation(len(TIMES))
    actors, answers = [], []
    for i in range(1 if level == 1 else 2):
        scan, colour, time = digits.draw_scan(rng, split, int(values[i])), COLOUR_NAMES[colours[i]], TIMES[times[i]]
        top, left = (int(x) for x in rng.integers(0, _FREE + 1, size=2))
        first, end = _THIRDS[time]
        actors.append(_Actor(scan, colour, first=first, end=end, top=top, left=left))
        answers.append(time)
    return actors, answers


def _walk(rng: np.random.Generator, scan: int, colour: str, first: int, end: int, way: str) -> _Actor:
    """Makes an actor that moves `way` along its track, at most half out of the picture at either end."""
    frames = end - first
    pixels = 4 if frames == FRAMES else 8
    down, right = WAYS[way]
    start = (_FREE - pixels * (frames - 1)) // 2  # of a walk right or down; left and up are the reverse
    across = int(rng.integers(0, _FREE + 1))
    along = start if down + right > 0 else _FREE - start
    top, left = (along, across) if down else (across, along)
    return _Actor(scan, colour, first=first, end=end, top=top, left=left, step=(down * pixels, right * pixels))


def _film(rng: np.random.Generator, actors: list[_Actor], asked: _Actor, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Paints the frames; also returns the pixels of the actor in question."""
    video = cluttered_frames(rng, FRAMES, SIZE, SIZE, level)
    evidence = np.zeros((FRAMES, SIZE, SIZE), bool)
    for actor in actors:
        for frame in range(actor.first, actor.end):
            steps = frame - actor.first
            top, left = actor.top + steps * actor.step[0], actor.left + steps * actor.step[1]
            covered = paint(video[frame], digits.glyph(actor.scan), top, left, actor.colour)
            if actor is asked:
                evidence[frame] = covered
    return video, evidence

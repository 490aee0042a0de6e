"""The domain nlp: arithmetic and logic in words. Add, subtract, compare, judge, and two steps in a row."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np

from anyexperts_jax.core.errors import require_one_of
from anyexperts_jax.data.domain import SPLITS, example_generator
from anyexperts_jax.data.example import LEVELS, Example
from anyexperts_jax.data.five_domains.marked_text import marked

NAMES = ("Ann", "Bob", "Eve", "Max", "Sam", "Zoe")
THINGS = ("pen", "cat", "egg", "hat", "key", "nut")
_COUNTED = (*THINGS, "number")
_IDLE = ("It is cold.", "The sun is up.", "Rain falls.", "Birds sing.")  # distractors without a number
_BYSTANDERS = ("Tim", "Joe", "Kim", "Lee")  # distractors with one: "Tim is 9."
_LARGEST = {1: 9, 2: 12, 3: 20}  # largest number in a question, by level
_LARGEST_OF_THREE = {1: 5, 2: 9, 3: 12}
Pair = tuple[int, int]
Numbers = tuple[int, ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Problem:
    text: str  # the question, with its evidence marked
    answer: str
    steps: tuple[Pair, ...]  # the pairs of numbers that are added, subtracted or compared to find the answer
    thing: str = "number"  # what is counted: one of THINGS, or bare numbers


def split_of(thing: str, first: int, second: int) -> str:
    """Returns the split that owns a pair of numbers of a thing: train has six eighths, the others one eighth each.

    3 pens and 4 pens are the same problem as 4 pens and 3 pens, added or compared, so the order does not matter.
    """
    low, high = sorted((first, second))
    remainder = (low + 3 * high + _COUNTED.index(thing)) % 8
    return {6: "validation", 7: "test"}.get(remainder, "train")


class Nlp:
    """Word problems of at most 80 bytes.

    The sources are a thing and, for each step of the answer, the unordered pair of its numbers that the step adds,
    subtracts or compares. So no split has a step that another split has, whatever the kind of question. "Ann has 3,
    finds 4 and loses 2" has two steps, 3 with 4 and 7 with 2. Every pair of numbers occurs in training with some of the
    things, as the shape of a 3 does in other domains: training shows what 3 and 4 make, but not what 3 pens and 4 pens
    make. The numbers grow from level 1 to 3. Level 2 adds an irrelevant sentence or a negation, level 3 an irrelevant
    sentence with a number, or a second clause.
    """

    name = "nlp"
    question_types = ("add", "subtract", "compare", "logic", "two_step")
    metric: Literal["exact"] = "exact"

    def example(self, split: str, index: int, seed: int = 0, levels: Sequence[int] = LEVELS) -> Example:
        rng, level = example_generator(self.name, split, index, seed, levels)
        kind = self.question_types[int(rng.integers(len(self.question_types)))]
        problem = _QUESTIONS[kind](rng, split, level)
        question, spans = marked(problem.text)
        return Example(
            domain=self.name,
            question_type=kind,
            level=level,
            question=question,
            answer=problem.answer,
            source=" ".join(f"{problem.thing}:{min(pair)},{max(pair)}" for pair in problem.steps),
            question_evidence=spans,
        )


def _add(rng: np.random.Generator, split: str, level: int) -> _Problem:
    thing, (a, b) = _draw(rng, "add", split, level)
    one, two = _names(rng)
    text = f"{one} has [{a}] {_plural(thing, a)}. {two} has [{b}] {_plural(thing, b)}. How many in all?"
    return _Problem(_distract(rng, text, level), str(a + b), ((a, b),), thing)


def _subtract(rng: np.random.Generator, split: str, level: int) -> _Problem:
    thing, (a, b) = _draw(rng, "subtract", split, level)
    one, two = _names(rng)
    text = f"{one} has [{a}] {_plural(thing, a)} and gives [{b}] to {two}. How many are left?"
    return _Problem(_distract(rng, text, level), str(a - b), ((a, b),), thing)


def _compare(rng: np.random.Generator, split: str, level: int) -> _Problem:
    thing, (a, b) = _draw(rng, "compare", split, level)
    one, two = _names(rng)
    ask = "more" if level == 1 else _pick(rng, ("more", "fewer"))
    text = f"[{one}] has [{a}] {_plural(thing, a)}. [{two}] has [{b}] {_plural(thing, b)}. Who has [{ask}]?"
    return _Problem(_distract(rng, text, level), one if (a > b) == (ask == "more") else two, ((a, b),), thing)


def _logic(rng: np.random.Generator, split: str, level: int) -> _Problem:
    truth = bool(rng.integers(2))
    clauses: tuple[bool, ...] = (truth,)
    if level == 3:  # "and" of two clauses: both hold, or at least one does not
        clauses = (True, True) if truth else _pick(rng, ((True, False), (False, True), (False, False)))
    _, numbers = _draw(rng, "logic", split, level)
    steps = _steps("logic", numbers)
    parts = []
    for holds, (a, b) in zip(clauses, steps, strict=True):
        negated = level > 1 and bool(rng.integers(2))
        word = "more" if (a > b) == (holds != negated) else "less"
        parts.append(f"[{a}] is {'[not] ' if negated else ''}[{word}] than [{b}]")
    return _Problem(" [and] ".join(parts) + ". True or false?", "true" if truth else "false", steps)


def _two_step(rng: np.random.Generator, split: str, level: int) -> _Problem:
    thing, (a, b, c) = _draw(rng, "two_step", split, level)
    one, _ = _names(rng)
    text = f"{one} has [{a}] {_plural(thing, a)}, [finds] [{b}] and [loses] [{c}]. How many now?"
    return _Problem(_distract(rng, text, level), str(a + b - c), _steps("two_step", (a, b, c)), thing)


_QUESTIONS: dict[str, Callable[[np.random.Generator, str, int], _Problem]] = {
    "add": _add,
    "subtract": _subtract,
    "compare": _compare,
    "logic": _logic,
    "two_step": _two_step,
}


@functools.cache
def _choices(kind: str, split: str, level: int) -> tuple[tuple[str, Numbers], ...]:
    """Lists all things and numbers that a question of this kind may have in this split, so that one draw suffices."""
    require_one_of("split", split, SPLITS)
    things = ("number",) if kind == "logic" else THINGS
    return tuple((thing, numbers) for thing in things for numbers in _numbers(kind, split, level, thing))


def _steps(kind: str, numbers: Numbers) -> tuple[Pair, ...]:
    """Returns the pairs of numbers that a question of this kind adds, subtracts or compares."""
    if kind == "two_step":
        a, b, c = numbers
        return (a, b), (a + b, c)
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _numbers(kind: str, split: str, level: int, thing: str) -> list[Numbers]:
    """Lists the numbers that a question may have: each of its steps belongs to the split."""
    one_to_top = range(1, (_LARGEST_OF_THREE if kind == "two_step" else _LARGEST)[level] + 1)
    pairs = [(a, b) for a in one_to_top for b in one_to_top if split_of(thing, a, b) == split]
    if kind == "add":
        return [(a, b) for a, b in pairs if level > 1 or a + b <= 9]
    if kind == "subtract":
        return [(a, b) for a, b in pairs if a > b]
    if kind == "two_step":
        return [(a, b, c) for a, b in pairs for c in one_to_top if c <= a + b and split_of(thing, a + b, c) == split]
    unequal = [(a, b) for a, b in pairs if a != b]
    if kind == "logic" and level == 3:
        return [p + q for p in unequal for q in unequal]
    return [*unequal]


def _draw(rng: np.random.Generator, kind: str, split: str, level: int) -> tuple[str, Numbers]:
    return _pick(rng, _choices(kind, split, level))


def _distract(rng: np.random.Generator, text: str, level: int) -> str:
    if level == 1:
        return text
    if level == 2:
        return f"{_pick(rng, _IDLE)} {text}"
    return f"{_pick(rng, _BYSTANDERS)} is {int(rng.integers(1, _LARGEST[level] + 1))}. {text}"


def _plural(thing: str, number: int) -> str:
    return thing if number == 1 else f"{thing}s"


def _names(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.permutation(len(NAMES))[:2]
    return NAMES[first], NAMES[second]


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]

"""What the experiment compares, and how much of it: the kinds of training, their policies, sizes and seeds."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.evaluate.policies import LAYERS
from anyexperts_jax.pretrained.neurons import Method
from anyexperts_jax.routing.policies import IMPORTANCE
from experiments.reproduce.code_version import CODE_VERSION

OWN_VERSION = 1  # raise it with any change to this package that changes a figure; other runs are then made again
STATIC, GAP, SHUFFLED, MERGED = "static", "score_gap", "shuffled", "merged"
_ID_LENGTH = 12
_BY_SALIENCE = ("model.moe.switches.importance_regulariser=salience", "model.moe.importance_weight=0.3")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of the trainings of a seed."""

    method: Method  # of the split
    policies: tuple[str, ...]  # that its checkpoint is measured with
    slots: bool = False  # whether it has attached slots: importance, virtual experts, a window
    set: tuple[str, ...] = ()  # overrides of its configuration


KINDS = {
    "static": Kind("activations", (STATIC, LAYERS, GAP, SHUFFLED)),
    "random": Kind("random", (STATIC,)),
    "paper": Kind("activations", (IMPORTANCE,), slots=True),
    "salience": Kind("activations", (IMPORTANCE,), slots=True, set=_BY_SALIENCE),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The options of the command.

    Raises:
      UserError: for sizes that do not fit each other.
    """

    model: pathlib.Path  # a dense checkpoint
    train: pathlib.Path  # text to learn from
    test: pathlib.Path  # text to measure on
    run: pathlib.Path  # where splits, trainings and their results are kept
    experts: int = 24
    shared: int = 4
    virtual: int = 5  # virtual experts of attached slots
    width: float = 4.0  # of the window of attached slots
    budgets: tuple[int, ...] = (18, 15, 12)  # real experts per token, without the shared ones
    steps: int = 24
    batch_size: int = 2
    length: int = 128
    lr: float = 1e-3
    importance_lr: float = 1e-2
    seeds: tuple[int, ...] = (0, 1, 2)
    test_tokens: int = 2048
    set: tuple[str, ...] = ()  # overrides of every training

    def __post_init__(self) -> None:
        require(0 <= self.shared < self.experts, f"--shared {self.shared} must be below --experts {self.experts}")
        require(len(set(self.budgets)) == len(self.budgets), f"--budget {_words(self.budgets)} names a budget twice")
        for budget in self.budgets:
            require(
                1 < budget < self.routed,
                f"--budget {budget} must be from 2 to below {self.routed}, the experts without the shared ones",
            )
        require(len(set(self.seeds)) == len(self.seeds), f"--seeds {_words(self.seeds)} names a seed twice")
        require(self.steps >= 2, f"--steps {self.steps} must be >= 2")
        require(self.length >= 2, f"--length {self.length} must be >= 2")
        require(
            self.k_min >= 1,
            f"--width {self.width:g} must be at most {self.routed + self.virtual - 1}, one slot less than all experts",
        )

    @property
    def routed(self) -> int:
        """Experts that the router chooses among, without virtual ones."""
        return self.experts - self.shared

    @property
    def k_max(self) -> int:
        """Slots of a token of importance 1: all experts, so that the teacher is the dense model."""
        return self.routed + self.virtual

    @property
    def k_min(self) -> float:
        return self.k_max - self.width

    @property
    def static_slots(self) -> tuple[int, ...]:
        """The whole numbers of experts at which static k is measured: one more at each end, to interpolate between."""
        return tuple(sorted({min(self.budgets) - 1, *self.budgets, max(self.budgets) + 1}))

    @functools.cached_property
    def sources(self) -> dict[str, str]:
        """Digests of the model and of the two texts.

        Raises:
          UserError: if one of them cannot be read.
        """
        return {name: _file_digest(getattr(self, name), f"--{name}") for name in ("model", "train", "test")}

    @functools.cached_property
    def train_text(self) -> str:
        return text_of(self.train, "--train")

    @functools.cached_property
    def test_text(self) -> str:
        return text_of(self.test, "--test")


def text_of(path: pathlib.Path, option: str) -> str:
    """Reads a text file, or the column "text" of a file of JSON Lines.

    Raises:
      UserError: if it cannot be read, or a line has no text.
    """
    whole = read_text(path, option)
    if path.suffix != ".jsonl":
        return whole
    texts = []
    for number, line in enumerate(whole.splitlines(), start=1):
        row = parse_json_object(line, f"{option} {path}, line {number}")
        require(isinstance(row.get("text"), str), f"{option} {path}, line {number}: there is no column 'text'")
        texts.append(row["text"])
    return "".join(texts)


def digest(**parts: Any) -> str:
    """Returns a name that is the same for the same parts under one version of the code."""
    text = json.dumps({"code": [CODE_VERSION, OWN_VERSION], **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]


def _file_digest(path: pathlib.Path, option: str) -> str:
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    found = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as opened:
                found.update(f"{file.name}\n".encode() + hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise UserError(f"cannot read {option} {path}: {error.strerror}") from error
    return found.hexdigest()[:_ID_LENGTH]


def _words(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))

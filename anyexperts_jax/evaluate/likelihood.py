"""Measures how well a model predicts the correct answers (loss, bits per byte, accuracy), and which it ranks first."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from numpy import ndarray

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.data.batches import answers, learned_texts, pad_rows, stack
from anyexperts_jax.data.conversation import with_answer
from anyexperts_jax.data.sequence import padded
from anyexperts_jax.data.source import Source
from anyexperts_jax.data.turns import chat_template, encode_item
from anyexperts_jax.evaluate.measure import Window, run_at
from anyexperts_jax.evaluate.trained import Trained
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import ModelOutput
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.train.losses import AnswerScores, answer_scores

MOST_CHOICES = 64  # answers tried per question; each needs a forward pass over its sequence

_answer_scores = jax.jit(answer_scores)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Sums over the answer tokens of some examples. Each token is predicted from the correct tokens before it."""

    nats: float = 0.0
    tokens: int = 0  # answer tokens, the end of each answer included
    correct: int = 0  # answer tokens that the model ranked first
    text_bytes: int = 0  # length of the answers in UTF-8

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        """Nats per answer token, as in training."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits spent on the answers and their ends, per byte of text: comparable across tokenizers."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    @property
    def token_accuracy(self) -> float:
        return self.correct / self.tokens if self.tokens else math.nan


def likelihood_of(output: ModelOutput, batch: Batch, tokenizer: Tokenizer) -> Likelihood:
    """Sums the likelihoods of all rows of a batch. Padding rows add nothing."""
    scores = _scores(output, batch)
    return Likelihood(
        nats=float(np.asarray(scores.loss_B).sum(dtype=np.float64)),
        tokens=int(np.asarray(scores.tokens_B).sum()),
        correct=int(np.asarray(scores.correct_B).sum()),
        text_bytes=sum(len(text.encode()) for text in learned_texts(batch, tokenizer)),
    )


def token_accuracies(output: ModelOutput, batch: Batch) -> list[float]:
    """Returns, for each row that is not padding, the share of its trained tokens that the model ranked first."""
    scores = _scores(output, batch)
    tokens_B, correct_B = np.asarray(scores.tokens_B), np.asarray(scores.correct_B)
    return [float(correct_B[i] / tokens_B[i]) for i in np.flatnonzero(tokens_B)]


def choose(trained: Trained, model: ModelConfig, source: Source, batches: Sequence[Batch], window: Window) -> list[str]:
    """Returns the most likely answer to each row's question, among all answers that `batches` have for its type.

    The likelihood is that of the whole answer, including its end. Padding rows get "".

    Raises:
      UserError: if a question type has more than MOST_CHOICES answers, or an answer does not fit into a sequence.
    """
    said = [_rows(batch, trained.tokenizer) for batch in batches]
    choices: dict[int, list[str]] = {}
    for _, question, answer in (row for rows in said for row in rows if row is not None):
        found = choices.setdefault(question, [])
        if answer not in found:
            found.append(answer)
    for question, found in choices.items():
        many = f"question type {source.question_types[question]!r} has {len(found)} answers, too many to choose among"
        require(len(found) <= MOST_CHOICES, f"{many} by likelihood (at most {MOST_CHOICES}); take another metric")
    picked = []
    for batch, rows in zip(batches, said, strict=True):
        for row in rows:
            if row is None:
                picked.append("")
                continue
            index, question, _ = row
            example, data = source[index], trained.config.data
            put = [with_answer(example, choice) for choice in choices[question]]
            how: dict[str, Any] = {"tokenizer": trained.tokenizer, "template": chat_template(data, trained.tokenizer)}
            encoded = [padded(encode_item(one, data.encoding, **how), data.encoding) for one in put]
            nats = _nats(trained, model, encoded, window, len(batch.tokens_BT))
            picked.append(choices[question][int(np.argmin(nats))])
    return picked


def _nats(
    trained: Trained, model: ModelConfig, encoded: Sequence[Mapping[str, np.ndarray]], window: Window, size: int
) -> Float[ndarray, " rows"]:
    """Computes the loss of each row's answer in nats, `size` rows at a time."""
    nats = []
    for begin in range(0, len(encoded), size):
        part = encoded[begin : begin + size]
        batch = pad_rows(stack(part), size, trained.tokenizer)
        scores = _scores(run_at(trained, model, batch, window), batch)
        nats.append(np.asarray(scores.loss_B)[: len(part)])
    return np.concatenate(nats)


def _rows(batch: Batch, tokenizer: Tokenizer) -> list[tuple[int, int, str] | None]:
    """Returns (example index, question type, answer) for each row, or None for a padding row."""
    valid_B = np.atleast_1d(np.asarray(batch.valid_BT).any(axis=1))
    columns = (np.asarray(batch.example_B).tolist(), np.asarray(batch.question_B).tolist(), answers(batch, tokenizer))
    return [row if valid else None for valid, row in zip(valid_B, zip(*columns, strict=True), strict=True)]


def _scores(output: ModelOutput, batch: Batch) -> AnswerScores:
    scores: AnswerScores = _answer_scores(output.logits_BTY, batch.tokens_BT, batch.loss_mask_BT, batch.segment_BT)
    return scores

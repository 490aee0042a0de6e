"""Greedy answers to a domain's questions, and their scores beside chance."""

from collections.abc import Sequence

import numpy as np

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.registries import METRICS
from anyexperts_jax.data.batches import answers, last_answers, prompts
from anyexperts_jax.data.scores import chance_scores, exact_match, score
from anyexperts_jax.data.source import Source
from anyexperts_jax.evaluate.likelihood import Likelihood
from anyexperts_jax.evaluate.measure import Window, window_array
from anyexperts_jax.evaluate.results import DomainScore, GroupScore
from anyexperts_jax.evaluate.trained import Trained
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.generate import generate
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.bytes import BYTES


def longest_answer(batches: Sequence[Batch]) -> int:
    """Returns the number of tokens of the longest answer, including EOS."""
    return max(int(last_answers(batch).sum(axis=1).max()) for batch in batches)


def predict(trained: Trained, model: ModelConfig, batch: Batch, window: Window, max_new_tokens: int) -> list[str]:
    """Generates the answer to each row's question, "" for padding. `model` is the run's, with room for `window`."""
    tokens_BJ = generate(
        model,
        trained.params,
        prompts(batch, trained.tokenizer),
        max_new_tokens=max_new_tokens,
        window=window_array(window),
        router_bias_LC=trained.router_bias_LC,
        stop_ids=trained.tokenizer.special.eos,
    )
    decode = trained.tokenizer.decode  # EOS and the padding after it decode to nothing
    return [decode(row) for row in np.asarray(tokens_BJ)]


def score_domain(
    domain: str,
    source: Source,
    batches: Sequence[Batch],
    predictions: Sequence[str],
    *,
    tokenizer: Tokenizer = BYTES,
    metric: str | None = None,
    likelihood: Likelihood | None = None,
    row_scores: Sequence[float] | None = None,
) -> DomainScore:
    """Scores the predictions for all rows of `batches` but padding rows.

    Args:
      metric: a name in METRICS; None: the source's own.
      likelihood: that of the same rows' correct answers; None: not known.
      row_scores: the score of each row but padding rows, if predictions are not scored; None: they are.
    """
    likelihood = likelihood or Likelihood()
    metric = metric or source.metric
    METRICS.check("metric", metric)
    rate = METRICS[metric].error_rate
    real_row = np.concatenate([np.asarray(batch.valid_BT).any(axis=1) for batch in batches])
    expected = [text for batch in batches for text in answers(batch, tokenizer)]
    types = [source.question_types[i] for batch in batches for i in np.asarray(batch.question_B)]
    levels = [str(level) for batch in batches for level in np.asarray(batch.level_B)]
    rows = np.nonzero(real_row)[0].tolist()
    pairs = [(predictions[i], expected[i]) for i in rows]
    found = [score(metric, said, answer) for said, answer in pairs] if row_scores is None else row_scores
    scores = np.array(found)
    error_rate = None if rate is None else rate(*map(list, zip(*pairs, strict=True)))
    table = _Table(metric, scores, [expected[i] for i in rows], [types[i] for i in rows])
    return DomainScore(
        domain=domain,
        metric=metric,
        examples=len(rows),
        score=float(scores.mean()),
        standard_error=float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else float("nan"),
        chance=table.chance(range(len(rows))),
        exact_match=float(np.mean([exact_match(said, answer) for said, answer in pairs])),
        wer=error_rate if metric == "wer" else None,
        by_question=table.groups([types[i] for i in rows]),
        by_level=table.groups([levels[i] for i in rows]),
        example_scores=tuple(float(one) for one in scores),
        error_rate=error_rate,
        loss=likelihood.loss,
        bits_per_byte=likelihood.bits_per_byte,
        token_accuracy=likelihood.token_accuracy,
    )


class _Table:
    """The scored examples of one domain, which can be grouped."""

    def __init__(self, metric: str, scores: np.ndarray, expected: list[str], types: list[str]) -> None:
        self._metric, self._scores, self._expected, self._types = metric, scores, expected, types

    def chance(self, rows: Sequence[int]) -> float:
        """Returns the mean score of the best constant answer to each question type among `rows`."""
        by_type: dict[str, list[str]] = {}
        for i in rows:
            by_type.setdefault(self._types[i], []).append(self._expected[i])
        chances = chance_scores(self._metric, by_type)
        return sum(chances[name] * len(found) for name, found in by_type.items()) / len(rows)

    def groups(self, labels: Sequence[str]) -> dict[str, GroupScore]:
        """Returns the score of each label's examples, in the order of labels."""
        found = {}
        for label in sorted(set(labels)):
            rows = [i for i, other in enumerate(labels) if other == label]
            found[label] = GroupScore(len(rows), float(self._scores[rows].mean()), self.chance(rows))
        return found

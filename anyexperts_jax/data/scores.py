"""How right an answer is: the metrics, and what the best constant answer would score.

A metric is an entry of `core.registries.METRICS`. One of your own goes there from a module that `--plugin` names:

    from anyexperts_jax.core.registries import METRICS
    from anyexperts_jax.data.scores import AnswerMetric
    METRICS.register("first_letter", AnswerMetric("first letter", lambda said, answer: float(said[:1] == answer[:1])))
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import jiwer
from rapidfuzz.distance import Levenshtein

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.registries import METRICS

ANLS_THRESHOLD = 0.5
_CANDIDATES = 50


@dataclasses.dataclass(frozen=True)
class AnswerMetric:
    """How a domain's answers are scored.

    label: what tables call the score.
    score: (prediction, answer) -> how right the prediction is, in [0, 1], higher is better.
    error_rate: (predictions, answers) -> errors of all pairs over the length of all answers, lower is better; None:
      the metric has none.
    by_likelihood: the prediction is not generated: it is that answer to the question's type which the model finds the
      likeliest.
    by_tokens: nothing is generated: the score is the share of right tokens, each predicted from the right ones before.
    """

    label: str
    score: Callable[[str, str], float]
    error_rate: Callable[[Sequence[str], Sequence[str]], float] | None = None
    by_likelihood: bool = False
    by_tokens: bool = False


def exact_match(prediction: str, answer: str) -> float:
    """1 when the two are the same but for case and outer or repeated spaces, else 0."""
    return float(_normalised(prediction) == _normalised(answer))


def anls(prediction: str, answer: str) -> float:
    """Average normalised Levenshtein similarity of one pair, in {0} and [0.5, 1] (Biten et al. 2019, ST-VQA).

    1 - distance / length of the longer string, and 0 where that is below the threshold 0.5: such an answer is taken
    for wrong reading rather than a slip. Case and repeated spaces do not count.
    """
    similarity = Levenshtein.normalized_similarity(_normalised(prediction), _normalised(answer))
    return float(similarity) if similarity >= ANLS_THRESHOLD else 0.0


def wer(prediction: str, answer: str) -> float:
    """Word error rate of one pair: (substitutions + deletions + insertions) / words of the answer. Can exceed 1."""
    return corpus_wer([prediction], [answer])


def corpus_wer(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Word errors of all pairs over the words of all answers, as speech recognition reports it. Lower is better.

    Raises:
      UserError: when the lengths differ, there is no pair, or an answer has no word.
    """
    return _error_rate("word", jiwer.wer, predictions, answers)


def cer(prediction: str, answer: str) -> float:
    """Character error rate of one pair, spaces between words included. Can exceed 1."""
    return corpus_cer([prediction], [answer])


def corpus_cer(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Character errors of all pairs over the characters of all answers. Lower is better.

    Raises:
      UserError: when the lengths differ, there is no pair, or an answer has no word.
    """
    return _error_rate("character", jiwer.cer, predictions, answers)


def f1(prediction: str, answer: str) -> float:
    """F1 of the words that both have, as SQuAD's (Rajpurkar et al. 2016) but with articles and punctuation.

    A word counts as often as it stands in both. 1 where neither has a word.
    """
    said, expected = _normalised(prediction).split(), _normalised(answer).split()
    if not said and not expected:
        return 1.0
    return 2 * (Counter(said) & Counter(expected)).total() / (len(said) + len(expected))


EXACT = AnswerMetric("exact match", exact_match)
ANLS = AnswerMetric("ANLS", anls)
WER = AnswerMetric("1 - WER", lambda said, answer: 1.0 - min(wer(said, answer), 1.0), corpus_wer)
CER = AnswerMetric("1 - CER", lambda said, answer: 1.0 - min(cer(said, answer), 1.0), corpus_cer)
F1 = AnswerMetric("word F1", f1)
TOKENS = AnswerMetric("tokens right", lambda said, answer: 0.0, by_tokens=True)  # the least a constant answer has
CHOICE = AnswerMetric("choice", exact_match, by_likelihood=True)


def score(metric: str, prediction: str, answer: str) -> float:
    """How right `prediction` is, in [0, 1], higher is better; for "wer" that is 1 - min(wer, 1).

    Raises:
      UserError: when the metric is unknown, or one of the user's own gives anything but a number in [0, 1].
    """
    METRICS.check("metric", metric)
    found = METRICS[metric].score(prediction, answer)
    try:
        inside = 0 <= found <= 1
    except TypeError as error:
        raise UserError(f"metric {metric!r} gives {found!r}; a score must be a number in [0, 1]") from error
    require(inside, f"metric {metric!r} gives {found!r}; a score must be a number in [0, 1]")
    return float(found)


def metric_label(metric: str) -> str:
    """What tables call it: its own name where its plugin is not loaded, as in a report of an earlier evaluation."""
    return METRICS[metric].label if metric in METRICS else metric


def chance_score(metric: str, answers: Iterable[str]) -> float:
    """The mean score of the constant answer that scores best on `answers`: what a model that sees nothing can reach.

    The candidates are the _CANDIDATES most common answers.

    Raises:
      UserError: when there are no answers or the metric is unknown.
    """
    counts = Counter(answers)
    require(counts.total() > 0, "chance score of no answers is undefined; give at least one")
    guesses = [guess for guess, _ in counts.most_common(_CANDIDATES)]
    sums = (sum(n * score(metric, guess, answer) for answer, n in counts.items()) for guess in guesses)
    return max(sums) / counts.total()


def chance_scores(metric: str, answers_by_type: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """`chance_score` of each question type: a model that reads the question alone can tell the types apart."""
    return {question_type: chance_score(metric, answers) for question_type, answers in answers_by_type.items()}


def _error_rate(
    unit: str, rate: Callable[[list[str], list[str]], float], predictions: Sequence[str], answers: Sequence[str]
) -> float:
    require(len(predictions) == len(answers), f"{len(predictions)} predictions for {len(answers)} answers")
    require(len(answers) > 0, f"{unit} error rate of no answers is undefined; give at least one")
    require(all(answer.split() for answer in answers), f"{unit} error rate is undefined for an answer without words")
    reference = [_normalised(answer) for answer in answers]
    return float(rate(reference, [_normalised(prediction) for prediction in predictions]))


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()

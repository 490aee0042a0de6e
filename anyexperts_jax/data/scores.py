"""The metrics of answers, and the score of the best constant answer.

A metric is an entry of `core.registries.METRICS`. A module that `--plugin` names can add your own:

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

    label: the name of the score in tables.
    score: (prediction, answer) -> score in [0, 1], higher is better.
    error_rate: (predictions, answers) -> errors of all pairs over the length of all answers, lower is better; None:
      the metric has none.
    by_likelihood: the prediction is not generated, but is the most likely of all answers to the question's type.
    by_tokens: nothing is generated; the score is the share of correct tokens, each predicted from the correct ones
      before it.
    """

    label: str
    score: Callable[[str, str], float]
    error_rate: Callable[[Sequence[str], Sequence[str]], float] | None = None
    by_likelihood: bool = False
    by_tokens: bool = False


def exact_match(prediction: str, answer: str) -> float:
    """Returns 1 if the two are equal apart from case and outer or repeated spaces, else 0."""
    return float(_normalise(prediction) == _normalise(answer))


def anls(prediction: str, answer: str) -> float:
    """Returns the normalised Levenshtein similarity of a pair, 0 or in [0.5, 1] (ANLS; Biten et al. 2019, ST-VQA).

    It is 1 - distance / length of the longer string, or 0 if that is below 0.5: such an answer is taken for a misread
    text and not for a slip. Case and repeated spaces do not count.
    """
    similarity = Levenshtein.normalized_similarity(_normalise(prediction), _normalise(answer))
    return float(similarity) if similarity >= ANLS_THRESHOLD else 0.0


def wer(prediction: str, answer: str) -> float:
    """Returns the word error rate of a pair: (substitutions + deletions + insertions) / words. It can exceed 1."""
    return corpus_wer([prediction], [answer])


def corpus_wer(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Returns the word errors of all pairs over the words of all answers, as is usual in speech recognition.

    Raises:
      UserError: if the lengths differ, there is no pair, or an answer has no word.
    """
    return _error_rate("word", jiwer.wer, predictions, answers)


def cer(prediction: str, answer: str) -> float:
    """Returns the character error rate of a pair, including spaces between words. It can exceed 1."""
    return corpus_cer([prediction], [answer])


def corpus_cer(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Returns the character errors of all pairs over the characters of all answers.

    Raises:
      UserError: if the lengths differ, there is no pair, or an answer has no word.
    """
    return _error_rate("character", jiwer.cer, predictions, answers)


def f1(prediction: str, answer: str) -> float:
    """Returns the F1 of common words, as in SQuAD (Rajpurkar et al. 2016) but with articles and punctuation.

    A word counts as often as it occurs in both. The result is 1 if neither has a word.
    """
    said, expected = _normalise(prediction).split(), _normalise(answer).split()
    if not said and not expected:
        return 1.0
    return 2 * (Counter(said) & Counter(expected)).total() / (len(said) + len(expected))


EXACT = AnswerMetric("exact match", exact_match)
ANLS = AnswerMetric("ANLS", anls)
WER = AnswerMetric("1 - WER", lambda said, answer: 1.0 - min(wer(said, answer), 1.0), corpus_wer)
CER = AnswerMetric("1 - CER", lambda said, answer: 1.0 - min(cer(said, answer), 1.0), corpus_cer)
F1 = AnswerMetric("word F1", f1)
TOKENS = AnswerMetric("tokens right", lambda said, answer: 0.0, by_tokens=True)  # its chance is 0
CHOICE = AnswerMetric("choice", exact_match, by_likelihood=True)


def score(metric: str, prediction: str, answer: str) -> float:
    """Scores a prediction in [0, 1], higher is better; for "wer" the score is 1 - min(wer, 1).

    Raises:
      UserError: if the metric is unknown, or a user's metric returns anything but a number in [0, 1].
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
    """Returns the label for tables, or the name if its plugin is not loaded, as in a report of an old evaluation."""
    return METRICS[metric].label if metric in METRICS else metric


def chance_score(metric: str, answers: Iterable[str]) -> float:
    """Returns the best mean score of a constant answer on `answers`, which a model that sees nothing can reach.

    The candidates are the _CANDIDATES most common answers.

    Raises:
      UserError: if there are no answers or the metric is unknown.
    """
    counts = Counter(answers)
    require(counts.total() > 0, "chance score of no answers is undefined; give at least one")
    guesses = [guess for guess, _ in counts.most_common(_CANDIDATES)]
    sums = (sum(n * score(metric, guess, answer) for answer, n in counts.items()) for guess in guesses)
    return max(sums) / counts.total()


def chance_scores(metric: str, answers_by_type: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Returns `chance_score` for each question type, since a model can tell the types apart by the question alone."""
    return {question_type: chance_score(metric, answers) for question_type, answers in answers_by_type.items()}


def _error_rate(
    unit: str, rate: Callable[[list[str], list[str]], float], predictions: Sequence[str], answers: Sequence[str]
) -> float:
    require(len(predictions) == len(answers), f"{len(predictions)} predictions for {len(answers)} answers")
    require(len(answers) > 0, f"{unit} error rate of no answers is undefined; give at least one")
    require(all(answer.split() for answer in answers), f"{unit} error rate is undefined for an answer without words")
    reference = [_normalise(answer) for answer in answers]
    return float(rate(reference, [_normalise(prediction) for prediction in predictions]))


def _normalise(text: str) -> str:
    return " ".join(text.split()).casefold()

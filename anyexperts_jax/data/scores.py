"""How right an answer is: exact match, ANLS and word error rate, and what the best constant answer would score."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import jiwer
from rapidfuzz.distance import Levenshtein

from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.data.domain import METRICS

ANLS_THRESHOLD = 0.5
_CANDIDATES = 50


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
    require(len(predictions) == len(answers), f"{len(predictions)} predictions for {len(answers)} answers")
    require(len(answers) > 0, "word error rate of no answers is undefined; give at least one")
    require(all(answer.split() for answer in answers), "word error rate is undefined for an answer without words")
    reference = [_normalised(answer) for answer in answers]
    return float(jiwer.wer(reference, [_normalised(prediction) for prediction in predictions]))


def score(metric: str, prediction: str, answer: str) -> float:
    """How right `prediction` is, in [0, 1], higher is better; for "wer" that is 1 - min(wer, 1).

    Raises:
      UserError: when the metric is unknown.
    """
    require_one_of("metric", metric, METRICS)
    if metric == "exact":
        return exact_match(prediction, answer)
    if metric == "anls":
        return anls(prediction, answer)
    return 1.0 - min(wer(prediction, answer), 1.0)


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


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()

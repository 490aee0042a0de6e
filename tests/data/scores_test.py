import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.registry import Registry
from anyexperts_jax.data import scores
from anyexperts_jax.data.scores import AnswerMetric


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [("7", "7", 1.0), ("7", "8", 0.0), (" Blue  sky", "blue sky", 1.0), ("", "7", 0.0), ("77", "7", 0.0)],
)
def test_exact_match(prediction, answer, expected):
    assert scores.exact_match(prediction, answer) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("tea", "TEA", 1.0),
        ("te", "tea", 2 / 3),  # one deletion in three
        ("ab", "ax", 0.5),  # one substitution in two: at the threshold
        ("abx", "ayz", 0.0),  # two in three: 1/3 is below it
        ("", "tea", 0.0),
    ],
)
def test_anls(prediction, answer, expected):
    assert scores.anls(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("3 7 1", "3 7 1", 0.0),
        ("3 1", "3 7 1", 1 / 3),  # deletion
        ("3 7 7 1", "3 7 1", 1 / 3),  # insertion
        ("3 stop 1", "3 7 1", 1 / 3),  # substitution
        ("", "3 7", 1.0),
        ("1 2 3", "7", 3.0),  # a substitution and two insertions
    ],
)
def test_wer(prediction, answer, expected):
    assert scores.wer(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("three", "three", 0.0),
        ("tree", "three", 1 / 5),  # deletion
        ("threes", "three", 1 / 5),  # insertion
        ("thrxe  Two", "three two", 1 / 9),  # a substitution; the space counts, its repetition does not
        ("", "six", 1.0),
        ("seven", "on", 4 / 2),  # three deletions and a substitution
    ],
)
def test_cer(prediction, answer, expected):
    assert scores.cer(prediction, answer) == pytest.approx(expected)
    assert scores.score("cer", prediction, answer) == pytest.approx(max(0, 1 - expected))


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the red cat", "Red  cat", 4 / 5),  # two of three, two of two
        ("cat cat", "cat", 2 / 3),  # a word counts as often as it is in both
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "cat", 1.0),
        ("", " ", 1.0),
    ],
)
def test_f1(prediction, answer, expected):
    assert scores.f1(prediction, answer) == pytest.approx(expected)
    assert scores.score("f1", prediction, answer) == pytest.approx(expected)


def test_a_registered_metric_is_used(monkeypatch):
    registry = Registry("metric", {"exact": scores.EXACT})
    monkeypatch.setattr(scores, "METRICS", registry)
    registry.register("length", AnswerMetric("length", lambda said, answer: len(said) / len(answer)))
    registry.register("overlap", AnswerMetric("overlap", lambda said, answer: min(len(said), len(answer)) / 4))
    registry.register("silent", AnswerMetric("silent", lambda said, answer: None))
    assert scores.score("length", "ab", "abcd") == 0.5
    assert scores.chance_score("overlap", ["abcd", "ab"]) == 0.75  # "abcd": 1 and 1/2
    assert scores.metric_label("length") == "length"
    assert scores.metric_label("exact") == "exact match"
    assert scores.metric_label("gone") == "gone"
    for name, said in (("length", "2.0"), ("silent", "None")):
        with pytest.raises(UserError, match=f"metric {name!r} gives {said}; a score must be a number in"):
            scores.score(name, "abcdefgh", "abcd")


def test_corpus_wer_weights_words_not_pairs():
    # 1 error in 1 word and 0 in 3: 1/4, where the mean over pairs would be 1/2.
    assert scores.corpus_wer(["2", "3 7 1"], ["1", "3 7 1"]) == pytest.approx(0.25)


def test_an_undefined_corpus_wer_is_refused():
    with pytest.raises(UserError, match="1 predictions for 2 answers"):
        scores.corpus_wer(["1"], ["1", "2"])
    with pytest.raises(UserError, match="no answers"):
        scores.corpus_wer([], [])
    with pytest.raises(UserError, match="without words"):
        scores.corpus_wer(["1"], [" "])


def test_scores_are_bounded_and_higher_is_better():
    assert scores.score("exact", "no", "no") == 1.0
    assert scores.score("anls", "te", "tea") == pytest.approx(2 / 3)
    assert scores.score("wer", "3 1", "3 7 1") == pytest.approx(2 / 3)
    assert scores.score("wer", "1 2 3", "7") == 0.0
    with pytest.raises(UserError, match="metric='bleu' is unknown; valid: exact, anls, wer"):
        scores.score("bleu", "a", "a")


def test_chance_is_the_best_constant_answer():
    assert scores.chance_score("exact", ["yes", "yes", "no", "yes"]) == 0.75
    # "1 2" gets 1 + 1/2 + 1/2 of three, more than either single word.
    assert scores.chance_score("wer", ["1 2", "1 3", "4 2"]) == pytest.approx(2 / 3)
    assert scores.chance_scores("exact", {"a": ["x"], "b": ["x", "y"]}) == {"a": 1.0, "b": 0.5}
    with pytest.raises(UserError, match="no answers"):
        scores.chance_score("exact", [])

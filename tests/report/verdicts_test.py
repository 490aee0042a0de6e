"""Verdicts that compare: importance against contrast, and one budget against another, question by question."""

import dataclasses

import numpy as np
import pytest
from evaluate.results_made_up import evaluation

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.report.verdicts import verdicts

MOE = AnyExpertsConfig(num_experts=8, num_virtual=2, k_min=3, k_max=6)


def verdict(result, question):
    return {one.question: one for one in verdicts(result, MOE)}.get(question)


def with_scores(result, *example_scores):
    """The result with these scores of single questions in the first domain, one sequence per budget."""
    budgets = []
    for one, scores in zip(result.budgets, example_scores, strict=True):
        first = dataclasses.replace(one.scores[0], example_scores=tuple(map(float, scores)))
        budgets.append(dataclasses.replace(one, scores=(first, *one.scores[1:])))
    return dataclasses.replace(result, budgets=tuple(budgets))


@pytest.mark.parametrize(
    ("lead", "met"), [((0.05, 0.01, 0.09), True), ((0.05, -0.01, 0.1), False), ((-0.2, -0.3, -0.1), False)]
)
def test_importance_beats_contrast_if_the_whole_interval_is_above(lead, met):
    result = evaluation()
    names = ("contrast_lead", "contrast_lead_low", "contrast_lead_high")
    one = dataclasses.replace(result.separations[0], **dict(zip(names, lead, strict=True)))
    found = verdict(
        dataclasses.replace(result, separations=(one,)), "text: importance beats contrast, difference of AUC"
    )
    assert found.met == met
    assert found.measured == f"{lead[0]:+.3f} ({lead[1]:+.3f} to {lead[2]:+.3f})"


@pytest.mark.parametrize(
    ("few", "many", "measured", "met"),
    [
        (np.zeros(64), np.ones(64), "+100.0% (+100.0% to +100.0%)", True),
        (np.ones(64), np.zeros(64), "-100.0% (-100.0% to -100.0%)", False),
        (np.ones(64), np.ones(64), "+0.0% (+0.0% to +0.0%)", False),
    ],
)
def test_a_budget_changes_the_score_if_the_paired_interval_excludes_zero(few, many, measured, met):
    found = verdict(with_scores(evaluation(), few, many), "general: budget changes the score, 3.6 over 2.4")
    assert (found.measured, found.met) == (measured, met)


def test_questions_are_compared_with_themselves():
    """Half of the questions are right at each budget. If they are the same ones, nothing changes; if they are others,
    the interval lies around 0."""
    half = np.arange(64) % 2
    same = verdict(with_scores(evaluation(), half, half), "general: budget changes the score, 3.6 over 2.4")
    other = verdict(with_scores(evaluation(), half, 1 - half), "general: budget changes the score, 3.6 over 2.4")
    assert same.measured == "+0.0% (+0.0% to +0.0%)"
    assert other.measured != same.measured
    assert not other.met


def test_missing_figures_are_not_judged():
    found = [one.question for one in verdicts(evaluation(), MOE)]
    assert not [question for question in found if "contrast" in question or "changes" in question]

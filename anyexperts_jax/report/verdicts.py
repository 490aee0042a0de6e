"""Verdicts on whether a run has learned to allocate experts: questions with the measured figure and the target."""

import dataclasses
import math

import numpy as np

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.evaluate.results import BudgetResult, EvaluationResult

BUDGET_TOLERANCE = 0.05  # relative error of the realised budget
LOAD_LIMIT = 2.0  # load of the busiest expert relative to the mean
CHANCE_MARGIN = 3.0  # standard errors above chance
DRAWS = 1000  # of the bootstrap over questions

_CAPS = {
    "round": "at most rho_max = {:g} before rounding",
    "floor": "at most rho_max = {:g}",
    "off": "no cap, {:g} expected",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One question: the measured figure, the target, and whether it is met."""

    question: str
    measured: str
    wanted: str
    met: bool


def verdicts(result: EvaluationResult, moe: AnyExpertsConfig) -> list[Verdict]:
    """Verdicts on scores at the budget nearest to that of training, on the realised budget at every budget, and on the
    worst load and virtual share of all."""
    return [
        *_scores(usual_budget(result, moe)),
        *_separations(result),
        *_contrast(result),
        *_budget_effect(result),
        *_budgets(result),
        _virtual_share(result, moe),
        _load(result),
    ]


def usual_budget(result: EvaluationResult, moe: AnyExpertsConfig) -> BudgetResult:
    """The measured budget nearest to that of training."""
    return min(result.budgets, key=lambda one: abs(one.budget - moe.expected_real_slots))


def _scores(usual: BudgetResult) -> list[Verdict]:
    found = []
    for score in usual.scores:
        wanted = score.chance + CHANCE_MARGIN * score.standard_error
        found.append(
            Verdict(
                f"{score.domain}: score at budget {usual.budget:g}",
                f"{score.score:.1%} ± {score.standard_error:.1%}",
                f"> {wanted:.1%}",
                score.score > wanted,
            )
        )
    return found


def _separations(result: EvaluationResult) -> list[Verdict]:
    return [
        Verdict(
            f"{one.modality}: importance finds the answer, ROC AUC",
            f"{one.auc:.3f} ({one.auc_low:.3f} to {one.auc_high:.3f})",
            "interval above 0.5",
            one.auc_low > 0.5,
        )
        for one in result.separations
    ]


def _contrast(result: EvaluationResult) -> list[Verdict]:
    """A patch's contrast needs no training: importance that finds the answer no better than it has learned nothing."""
    return [
        Verdict(
            f"{one.modality}: importance beats contrast, difference of AUC",
            f"{one.contrast_lead:+.3f} ({one.contrast_lead_low:+.3f} to {one.contrast_lead_high:+.3f})",
            "interval above 0",
            one.contrast_lead_low > 0,
        )
        for one in result.separations
        if not math.isnan(one.contrast_lead_low)
    ]


def _budget_effect(result: EvaluationResult) -> list[Verdict]:
    """Whether more experts change the answers: the paired difference between the largest and the smallest budget."""
    few, many = (pick(result.budgets, key=lambda one: one.budget) for pick in (min, max))
    if few.budget == many.budget:
        return []
    found = []
    for low, high in zip(few.scores, many.scores, strict=True):
        gain_N = np.subtract(high.example_scores, low.example_scores)
        if len(gain_N) == 0:  # a file of a version that kept no score of single examples
            continue
        drawn = np.random.default_rng(len(gain_N)).integers(len(gain_N), size=(DRAWS, len(gain_N)))
        below, above = np.quantile(gain_N[drawn].mean(axis=1), (0.025, 0.975))
        found.append(
            Verdict(
                f"{low.domain}: budget changes the score, {many.budget:g} over {few.budget:g}",
                f"{gain_N.mean():+.1%} ({below:+.1%} to {above:+.1%})",
                "interval above 0",
                bool(below > 0),
            )
        )
    return found


def _budgets(result: EvaluationResult) -> list[Verdict]:
    return [
        Verdict(
            f"realised average at budget {one.budget:g}",
            f"{one.realised:.2f} ({(one.realised - one.budget) / one.budget:+.1%})",
            f"within {BUDGET_TOLERANCE:.0%}",
            one.budget_error <= BUDGET_TOLERANCE,
        )
        for one in result.budgets
    ]


def _virtual_share(result: EvaluationResult, moe: AnyExpertsConfig) -> Verdict:
    largest = max(one.largest_virtual_share for one in (result.trained, *(b.routing for b in result.budgets)))
    return Verdict(
        "virtual share, largest of any token, layer and budget",
        f"{largest:.3f}",
        _CAPS[moe.switches.cap_rounding].format(moe.rho_max),
        largest <= max([moe.rho_max, *(cap / k for k, cap in enumerate(moe.virtual_caps) if k)]) + 1e-6,
    )


def _load(result: EvaluationResult) -> Verdict:
    worst = max(result.budgets, key=lambda one: max(one.routing.load_max_over_mean))
    load = max(worst.routing.load_max_over_mean)
    return Verdict(
        "busiest expert over the mean, worst layer and budget",
        f"{load:.2f} at budget {worst.budget:g}",
        f"< {LOAD_LIMIT:g}",
        load < LOAD_LIMIT,
    )

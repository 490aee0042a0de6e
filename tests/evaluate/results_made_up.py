"""Invented evaluation results, computed by a rule."""

import dataclasses

import numpy as np

from anyexperts_jax.evaluate.importance import Separation
from anyexperts_jax.evaluate.results import (
    BudgetResult,
    BudgetTime,
    DomainScore,
    EvaluationResult,
    GroupScore,
    RoutingSummary,
)

NAN = float("nan")


def summary(window=(3.0, 6.0), real=3.6) -> RoutingSummary:
    rng = np.random.default_rng(0)
    by_layer = tuple((real - 0.1 * layer, real + 0.1, NAN, NAN) for layer in range(2))
    return RoutingSummary(
        window=window,
        tokens=100,
        real_slots=real,
        real_slots_by_domain={"general": real + 0.1, "nlp": real - 0.1},
        real_slots_by_modality={"text": real, "image": real + 0.1},
        real_slots_by_layer=(real, real),
        real_slots_LM=by_layer,
        importance_LM=by_layer,
        virtual_share_LM=((0.1, 0.2, NAN, NAN),) * 2,
        virtual_share=0.15,
        largest_virtual_share=0.2,
        load_LME=tuple(
            tuple(tuple(rng.integers(1, 9, 8).tolist()) if m < 2 else (0,) * 8 for m in range(4)) for _ in range(2)
        ),
        load_max_over_mean=(1.4, 1.6),
        dropped=0,
    )


def separation(name, auc) -> Separation:
    return Separation(
        name, 9, 50, 200, auc, auc - 0.03, auc + 0.03, auc, (0.5, auc), 0.6, 0.5, {"contrast": 0.7, "random": 0.5}
    )


def evaluation(general="general", nlp="nlp", budgets=(2.4, 3.6)) -> EvaluationResult:
    """Returns an evaluation of two domains with these names."""

    def score(domain, value):
        group = {"a": GroupScore(8, value, 0.1)}
        return DomainScore(domain, "exact", 8, value, 0.05, 0.1, value, None, group, {"1": GroupScore(8, value, 0.1)})

    found = tuple(
        BudgetResult(
            budget,
            budget,
            budget,
            dataclasses.replace(
                summary((budget, budget + 3), budget * 1.01),
                real_slots_by_domain={general: budget + 0.1, nlp: budget - 0.1},
            ),
            (score(general, 0.2 * budget / 2.4), score(nlp, 0.5)),
            BudgetTime(3.6, budget / 3.6, budget / 3.6, 0.1, 0.01),
        )
        for budget in budgets
    )
    separations = (separation("text", 0.71), separation("image", 0.42))
    whole = dataclasses.replace(summary(), real_slots_by_domain={general: 3.7, nlp: 3.5})
    return EvaluationResult(4, 8, "cpu", {"python": "3.11"}, whole, separations, found)

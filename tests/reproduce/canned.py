"""Invented results, and the experiments that they belong to."""

import numpy as np

from anyexperts_jax.data.domain import SPLITS_VERSION
from anyexperts_jax.evaluate.importance import Separation
from anyexperts_jax.evaluate.results import DomainScore, GroupScore
from experiments.reproduce.collect import Results
from experiments.reproduce.run_result import BudgetScores, RunResult

DOMAINS = ("general", "ocr", "nlp", "speech", "video")
ALL_BUDGETS = (4.8, 6.4, 7.2, 8.0, 9.6)
SEEDS = (0, 1, 2, 3, 4)


def domain_score(domain, score):
    wer = 1 - score if domain == "speech" else None
    group = GroupScore(8, score, 0.25)
    return DomainScore(
        domain, "wer" if wer is not None else "exact", 16, score, 0.1, 0.25, score, wer, {"which": group}, {"1": group}
    )


def at_budget(budget, score, realised=None):
    """The result at a budget; `score` is the score of every domain, or a function of the domain's name."""
    found = tuple(domain_score(name, score(name) if callable(score) else score) for name in DOMAINS)
    by_domain = dict.fromkeys(DOMAINS, budget)
    real = budget if realised is None else realised
    window = (budget, budget)
    return BudgetScores(budget, budget, real, window, by_domain, {"text": real}, 0.2, (1.5, 1.25), 0, found)


def separation(modality, auc):
    others = {"contrast": 0.75, "random": 0.5}
    return Separation(modality, 8, 20, 80, auc, auc - 0.1, auc + 0.1, auc, (auc, auc), 0.6, 0.5, others)


def run_result(name, seed, budgets, own, auc=None):
    modalities = () if auc is None else ("text", "video")
    return RunResult(
        id=f"{name}-{seed}",
        name=name,
        seed=seed,
        trained_budget=own,
        step=10,
        validation=dict.fromkeys(DOMAINS, 0.5),
        budgets=tuple(budgets),
        separations=tuple(separation(one, auc) for one in modalities),
        train_seconds=10.0,
        evaluate_seconds=1.0,
        device="cpu",
        versions={"jax": "0"},
        splits=SPLITS_VERSION,
    )


def noise(seed):
    """What the runs of one seed share: it cancels in differences."""
    return float(np.random.default_rng(seed).normal(0, 0.05))


def figure3(gain=0.0, loss_at=lambda domain, budget: 0.0, auc=0.5, seeds=SEEDS):
    """Dynamic scores `gain` above static at equal budget and loses `loss_at` at lower budgets, up to jitter."""

    def dynamic(seed, budget):
        return at_budget(budget, lambda name: 0.5 + noise(seed) + gain + jitter(seed, budget) + loss_at(name, budget))

    found = {}
    for seed in seeds:
        points = [dynamic(seed, budget) for budget in ALL_BUDGETS]
        found["dynamic 8.0", seed] = run_result("dynamic 8.0", seed, points, 8.0, auc + jitter(seed, 1))
        static = [at_budget(float(k), 0.5 + noise(seed)) for k in (4, 6, 8, 10)]
        found["static 8", seed] = run_result("static 8", seed, static, 8.0)
        for k in (4, 6, 10):
            point = at_budget(float(k), 0.5 + noise(seed))
            found[f"static {k}", seed] = run_result(f"static {k}", seed, [point], float(k))
        for budget in (4.8, 9.6):
            found[f"dynamic {budget}", seed] = run_result(f"dynamic {budget}", seed, [dynamic(seed, budget)], budget)
    return Results(found)


def jitter(seed, salt):
    """A small number, different for every seed, with a mean near 0."""
    return float(np.random.default_rng([seed, int(10 * salt)]).uniform(-0.002, 0.002))


def table3(hsm=0.0, spread=0.002, seeds=SEEDS):
    """Without HSM the score is lower by `hsm`, give or take `spread`."""
    found = {}
    for place, seed in enumerate(seeds):
        found["dynamic 8.0", seed] = run_result("dynamic 8.0", seed, [at_budget(8.0, 0.5 + noise(seed))], 8.0, 0.6)
        lost = hsm + spread * (place - 2)
        without = at_budget(8.0, 0.5 + noise(seed) - lost)
        found["without HSM", seed] = run_result("without HSM", seed, [without], 8.0, 0.6)
    return Results(found)

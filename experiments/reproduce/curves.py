"""Curves of score against budget: of one checkpoint at several budgets, or of a model retrained for each."""

import dataclasses
import math
from collections.abc import Sequence

from experiments.reproduce.collect import Results
from experiments.reproduce.run_result import BudgetScores
from experiments.reproduce.statistics import interpolate

DYNAMIC, STATIC, SALIENCE = "dynamic 8.0", "static 8", "salience"  # the variants evaluated at several budgets


@dataclasses.dataclass(frozen=True)
class Curve:
    """The points of several seeds, in the same order of budgets for each."""

    name: str
    points: dict[int, tuple[BudgetScores, ...]]  # by seed

    @property
    def seeds(self) -> list[int]:
        return sorted(self.points)

    def figures(self, index: int, domain: str | None) -> list[float]:
        """Returns each seed's score at the index-th budget; with domain None, the mean over domains."""
        return [domain_score(self.points[seed][index], domain) for seed in self.seeds]


def one_checkpoint(results: Results, variant: str, name: str) -> Curve:
    """Returns the curve of the variant's checkpoints, by realised budget."""
    return Curve(name, {seed: _ordered(results.found[variant, seed].budgets) for seed in results.seeds(variant)})


def retrained(results: Results, kind: str, name: str) -> Curve:
    """Returns the curve of all variants named "`kind` BUDGET", each at its own budget, for seeds that have them all.

    A single budget makes no curve, because the checkpoint's own curve has that point too.
    """
    variants = sorted({variant for variant, _ in results.found if variant.split(" ")[0] == kind})
    if len(variants) < 2:
        return Curve(name, {})
    points = {seed: [results.found[variant, seed].own for variant in variants] for seed in results.seeds(*variants)}
    return Curve(name, {seed: _ordered(found) for seed, found in points.items()})


def all_curves(results: Results) -> list[Curve]:
    """Returns the curves of Figure 3 that have at least one seed."""
    curves = [
        retrained(results, "dynamic", "dynamic, retrained"),
        retrained(results, "static", "static, retrained"),
        retrained(results, "salience", "dynamic by salience (ours), retrained"),
        one_checkpoint(results, DYNAMIC, "dynamic, one checkpoint"),
        one_checkpoint(results, STATIC, "static, one checkpoint"),
        one_checkpoint(results, SALIENCE, "dynamic by salience (ours), one checkpoint"),
    ]
    return [curve for curve in curves if curve.points]


def gains(curve: Curve, reference: Curve, domain: str | None = None) -> list[float]:
    """Returns how much higher `curve` scores than `reference` at equal realised budget, for each seed of both.

    The reference's score is interpolated between its points; points of `curve` outside their range are left out, and
    the others averaged.
    """
    found = []
    for seed in curve.seeds:
        if seed in reference.points:
            known_x = [point.realised for point in reference.points[seed]]
            known_y = [domain_score(point, domain) for point in reference.points[seed]]
            gained = [
                domain_score(point, domain) - interpolate(point.realised, known_x, known_y)
                for point in curve.points[seed]
            ]
            defined = [gain for gain in gained if not math.isnan(gain)]
            if defined:
                found.append(sum(defined) / len(defined))
    return found


def domain_score(point: BudgetScores, domain: str | None) -> float:
    """Returns the score of one domain; with None, the mean over domains."""
    if domain is not None:
        return point.score(domain).score
    return sum(score.score for score in point.scores) / len(point.scores)


def domains_of(results: Results) -> list[str]:
    """Returns the domains in the order of the evaluation."""
    first = next(iter(results.found.values()))
    return [score.domain for score in first.budgets[0].scores]


def _ordered(points: Sequence[BudgetScores]) -> tuple[BudgetScores, ...]:
    return tuple(sorted(points, key=lambda point: point.nominal))

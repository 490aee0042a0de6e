"""Differences in nats at equal realised experts, paired by seed, and verdicts on them by the reproduction's rule."""

import dataclasses
import math
from collections.abc import Sequence

from anyexperts_jax.evaluate.policies import LAYERS
from anyexperts_jax.routing.policies import IMPORTANCE
from experiments.dial.measure import Point
from experiments.dial.plan import GAP, SHUFFLED, STATIC
from experiments.dial.runs import UNTRAINED, Outcome
from experiments.reproduce.claims import Verdict, better
from experiments.reproduce.statistics import Summary, interpolate, summarise


@dataclasses.dataclass(frozen=True)
class Series:
    """The passes of one policy with the checkpoints of one kind."""

    label: str
    kind: str
    policy: str


STATIC_K = Series("static k", STATIC, STATIC)
SERIES = (
    STATIC_K,
    Series("static per layer", STATIC, LAYERS),
    Series("D2DMoE's threshold", STATIC, GAP),
    Series("AnyExperts, the paper's terms", "paper", IMPORTANCE),
    Series("AnyExperts by salience", "salience", IMPORTANCE),
    Series("shuffled K", STATIC, SHUFFLED),
    Series("static k, random split", "random", STATIC),
    Series("static k, before training", UNTRAINED, STATIC),
)
_BY_LABEL = {one.label: one for one in SERIES}
_CLAIMS = (
    ("Static per layer beats static k", "static per layer", "static k"),
    ("D2DMoE's threshold beats static k", "D2DMoE's threshold", "static k"),
    ("AnyExperts by the paper's terms beats static k", "AnyExperts, the paper's terms", "static k"),
    ("AnyExperts by salience beats static k", "AnyExperts by salience", "static k"),
    ("AnyExperts by salience beats D2DMoE's threshold", "AnyExperts by salience", "D2DMoE's threshold"),
    ("D2DMoE's threshold beats shuffled K", "D2DMoE's threshold", "shuffled K"),
    ("Shuffled K beats static k (a control: it should not)", "shuffled K", "static k"),
    ("A split by activations beats a random one", "static k", "static k, random split"),
    ("Self-distillation helps static k", "static k", "static k, before training"),
)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim that one series has a lower loss than another, with its verdict.

    Attributes:
      effect: the loss of the other less that of the first, nats per token, mean of budgets; a value per seed.
      by_budget: the same at each budget.
    """

    statement: str
    verdict: Verdict
    effect: Summary
    by_budget: dict[float, Summary]


def judge(outcomes: Sequence[Outcome], budgets: Sequence[float]) -> list[Judged]:
    """Returns all claims, those without a measurement undecided."""
    found = []
    for statement, ours, theirs in _CLAIMS:
        gains = {budget: _differences(outcomes, _BY_LABEL[ours], _BY_LABEL[theirs], budget) for budget in budgets}
        seeds = sorted(set.intersection(*(set(gained) for gained in gains.values())))
        effect = summarise([sum(gains[budget][seed] for budget in budgets) / len(budgets) for seed in seeds])
        by_budget = {budget: summarise([gained[seed] for seed in seeds]) for budget, gained in gains.items()}
        found.append(Judged(statement, better(effect), effect, by_budget))
    return found


def _differences(outcomes: Sequence[Outcome], ours: Series, theirs: Series, budget: float) -> dict[int, float]:
    own, other = advantage(outcomes, ours, budget), advantage(outcomes, theirs, budget)
    return {seed: own[seed] - other[seed] for seed in own if seed in other}


def advantage(outcomes: Sequence[Outcome], series: Series, budget: float) -> dict[int, float]:
    """Returns, by seed, how far the loss is below that of the seed's static k at the experts that the text got.

    Static k is interpolated between whole numbers of experts. What was measured before training counts for all seeds.
    """
    found = {}
    for outcome in outcomes:
        if outcome.kind != STATIC:
            continue
        reference = points_of(outcome, STATIC)
        known_x = [_number(point.realised) for point in reference]
        known_y = [point.nats for point in reference]
        for point in _own_points(outcomes, series, outcome.seed):
            if point.budget == budget:
                value = interpolate(_number(point.realised), known_x, known_y) - point.nats
                if not math.isnan(value):
                    found[outcome.seed] = value
    return found


def points_of(outcome: Outcome, policy: str) -> list[Point]:
    """Returns the passes of a policy, by realised experts."""
    return sorted((one for one in outcome.points if one.policy == policy), key=lambda one: _number(one.realised))


def mean_points(outcomes: Sequence[Outcome], series: Series) -> dict[float, tuple[float, float, float]]:
    """Returns, by budget, the means over seeds of realised experts and nats, and the sample deviation of nats."""
    gathered: dict[float, list[Point]] = {}
    for outcome in outcomes:
        for point in points_of(outcome, series.policy) if outcome.kind == series.kind else ():
            gathered.setdefault(_number(point.budget), []).append(point)
    found = {}
    for budget, points in sorted(gathered.items()):
        nats = summarise([point.nats for point in points])
        found[budget] = (summarise([_number(point.realised) for point in points]).mean, nats.mean, nats.sd)
    return found


def _own_points(outcomes: Sequence[Outcome], series: Series, seed: int) -> list[Point]:
    return [
        point
        for outcome in outcomes
        if outcome.kind == series.kind and (outcome.seed == seed or series.kind == UNTRAINED)
        for point in points_of(outcome, series.policy)
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value

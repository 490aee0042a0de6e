"""EvoMoE's claims, each with a verdict by the rule of `claims`, fixed before the results were seen.

Each claim is judged for experts evolved by our default reading and, as "(snapshots, ours)", for experts that stop
following while the learning rate is high, which do not end alike. Differences are paired by seed. Besides scores there
are losses in nats per answer token and overlaps of densities, judged by the same margins, and the distance of experts 2
to N from expert 1 divided by expert 1's drift from the dense FFN: the experts end apart if it is above `APART`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from experiments.reproduce.claims import Claim, Unit, Verdict, better, equal, signed
from experiments.reproduce.collect import Results, mean_score
from experiments.reproduce.papers import evomoe_scores
from experiments.reproduce.run_result import ExpertFigures, RunResult
from experiments.reproduce.statistics import Summary, summarise

APART = 0.1
DENSE, ALONE, COPIES, COPIES_DTR = "dense", "expert 1 alone", "MoE-tuning", "MoE-tuning + DTR"
KINDS = {"evolution": "", "snapshots": " (snapshots, ours)"}  # ways to evolve, by the prefix of variants' names
BOTH = "evolution + DTR"
LINEAR_SLOTS, DTR_SLOTS = "dynamic 8.0", "dynamic 8.0, DTR"

Judge = Callable[[Summary], Verdict]
Figure = Callable[..., float]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim, and the paper's figures in percent, as text."""

    claim: Claim
    paper: str


def evomoe_findings(results: Results) -> list[Finding]:
    """Returns the findings whose runs are done, from the results of all EvoMoE's experiments together."""
    main = main_findings(results)
    rest = [*_routers(results), *_diversity(results), *_beta(results), *_numbers(results)]
    return [*main, *(one for one in rest if one is not None)]


def main_findings(results: Results) -> list[Finding]:
    """Returns the findings on the method's parts and on its experts and routers: short enough for a page of docs/."""
    found = [*_components(results), *_uniformity(results), *_rigidity(results), *_apart(results)]
    return [one for one in found if one is not None]


def _components(results: Results) -> list[Finding | None]:
    gained = [_gain(results, "DTR beats a linear router: copied experts", COPIES_DTR, COPIES)]
    for kind, how in KINDS.items():
        linear, both = f"{kind} + linear", f"{kind} + DTR"
        gained += [
            _gain(results, f"Evolution and DTR beat MoE-tuning{how}", both, COPIES),
            _gain(results, f"Evolved experts beat copies, linear router{how}", linear, COPIES),
            _gain(results, f"Evolved experts beat copies, DTR{how}", both, COPIES_DTR),
            _gain(results, f"DTR beats a linear router: evolved experts{how}", both, linear),
            _gain(results, f"Evolution and DTR beat the dense model{how}", both, DENSE),
            _gain(results, f"Evolution and DTR beat expert 1 alone, which trained as long (ours){how}", both, ALONE),
        ]
    return gained


def _routers(results: Results) -> list[Finding | None]:
    gained = []
    for kind, how in KINDS.items():
        per, dtr = f"{kind} + per modality", f"{kind} + DTR"
        gained += [
            _gain(results, f"A linear router for each modality beats one for all{how}", per, f"{kind} + linear"),
            _gain(results, f"DTR beats a linear router for each modality{how}", dtr, per),
            _gain(results, f"A shared router beside does not help one for each modality{how}", per, f"{per}, shared"),
            _gain(results, f"A shared router beside does not help DTR{how}", dtr, f"{dtr}, shared"),
        ]
    return gained


def _diversity(results: Results) -> list[Finding | None]:
    others = ("noise", "dropout", "contrastive", "local entropy", "evolving in stage I")
    return [
        _gain(results, f"Evolution beats: {other}{how}", f"{kind} + DTR", other)
        for kind, how in KINDS.items()
        for other in others
    ]


def _beta(results: Results) -> list[Finding | None]:
    fixed = [
        _gain(results, f"Beta drawn from the paper's ranges beats {other}", BOTH, other)
        for other in ("beta 0", "beta 0.5", "beta 0.9", "beta 0.99")
    ]
    same = "Beta 0 leaves expert 1 (the paper: to the digit)"
    literal = "A moving average beats equation (1) as printed (ours)"
    return [
        *fixed,
        _finding(results, same, equal, "score", ("beta 0", ALONE), lambda a, b: -abs(mean_score(a) - mean_score(b))),
        _gain(results, literal, BOTH, "literal"),
    ]


def _numbers(results: Results) -> list[Finding | None]:
    four = "snapshots + DTR"
    top_2 = [
        _gain(
            results, f"Evolution and DTR at top-1 beat MoE-tuning at top-2{how}", f"{kind} + DTR", "MoE-tuning, top-2"
        )
        for kind, how in KINDS.items()
    ]
    return [
        *top_2,
        _gain(results, "Four experts beat two (snapshots, ours)", four, f"{four}, 2 experts"),
        _gain(results, "Eight experts beat four (snapshots, ours)", f"{four}, 8 experts", four),
        _gain(results, "DTR beats a linear router with variable slots (ours)", DTR_SLOTS, LINEAR_SLOTS),
    ]


def _uniformity(results: Results) -> list[Finding | None]:
    found = [
        _finding(
            results,
            f"Expert uniformity: shuffling costs nothing after MoE-tuning from copies, {how}",
            equal,
            "nats",
            (name,),
            lambda r: -shuffle_cost(r),
        )
        for name, how in ((COPIES, "linear router"), (COPIES_DTR, "DTR"))
    ]
    for kind, how in KINDS.items():
        statement = f"Shuffling costs where experts evolved{how}"
        found.append(_finding(results, statement, better, "nats", (f"{kind} + DTR",), shuffle_cost))
    return found


def _rigidity(results: Results) -> list[Finding | None]:
    def less(linear: RunResult, dtr: RunResult) -> float:
        return overlap(linear) - overlap(dtr)

    return [
        _finding(
            results,
            f"Router rigidity: logits of image and text overlap more with a linear router{how}",
            better,
            "overlap",
            (f"{kind} + linear", f"{kind} + DTR"),
            less,
        )
        for kind, how in KINDS.items()
    ]


def _apart(results: Results) -> list[Finding | None]:
    cases = (
        ("a cosine to zero, the paper's", "cosine to zero"),
        ("a rate that ends at half", BOTH),
        ("snapshots (ours)", "snapshots + DTR"),
    )
    return [
        _finding(results, f"Evolved experts end apart: {how}", better, "drift", (name,), lambda r: apart(r) - APART)
        for how, name in cases
    ]


def _gain(results: Results, statement: str, ours: str, theirs: str) -> Finding | None:
    """Returns the finding on how much higher `ours` scores, as the mean of domains and by domain."""
    return _finding(results, statement, better, "score", (ours, theirs), lambda a, b: mean_score(a) - mean_score(b))


def _finding(
    results: Results, statement: str, judge: Judge, unit: Unit, variants: Sequence[str], figure: Figure
) -> Finding | None:
    """Returns the finding about `figure` of one seed's results; None if no seed has all variants and the figure."""
    effect = summarise([one for one in results.paired(variants, figure) if not math.isnan(one)])
    if effect.n == 0:
        return None
    limit = APART if unit == "drift" else 0.0
    claim = Claim(statement, judge(effect), effect, unit, _evidence(results, unit, variants), limit)
    return Finding(claim, _paper(variants) if unit == "score" else "")


def _evidence(results: Results, unit: Unit, variants: Sequence[str]) -> str:
    if unit != "score" or len(variants) != 2:
        return ""
    first = results.found[variants[0], results.seeds(*variants)[0]]
    parts = []
    for domain in (score.domain for score in first.own.scores):
        gains = results.paired(variants, lambda a, b, d=domain: mean_score(a, None, (d,)) - mean_score(b, None, (d,)))
        parts.append(f"{domain} {signed(summarise(gains))}")
    return ", ".join(parts)


PAPER_ROWS: Mapping[str, str] = {  # our variant: the paper's row
    DENSE: "dense",
    COPIES: "moe_tuning",
    COPIES_DTR: "moe_tuning_dtr",
    "evolution + linear": "evolution_linear",
    BOTH: "evolution_dtr",
    "evolution + per modality": "per_modality",
    "evolution + per modality, shared": "per_modality_shared",
    "evolution + DTR, shared": "dtr_shared",
    "MoE-tuning, top-2": "moe_llava_top2",
    "noise": "noise",
    "dropout": "dropout",
    "contrastive": "contrastive",
    "local entropy": "local_entropy",
    "evolving in stage I": "stage_one",
}
_ON_FOUR = {"evolution + linear": "linear", BOTH: "dtr"}  # the same four benchmarks as for routers and diversity


def _paper(variants: Sequence[str]) -> str:
    """Returns the paper's two figures for a pair of variants; an empty text for our own variants."""
    if not set(variants) <= set(PAPER_ROWS):
        return ""
    scores, rows = evomoe_scores(), [PAPER_ROWS[name] for name in variants]
    whole = {"dense", "moe_tuning", "moe_tuning_dtr", "evolution_linear", "evolution_dtr", "moe_llava_top2"}
    if not set(rows) <= whole:
        rows = [_ON_FOUR.get(name, row) for name, row in zip(variants, rows, strict=True)]
    return " / ".join(f"{scores[row]:.1f}" for row in rows)


def shuffle_cost(result: RunResult) -> float:
    """Returns the nats per answer token that shuffling the router's logits costs."""
    return math.nan if result.experts is None else result.experts.shuffled_loss - result.experts.loss


def overlap(result: RunResult, pair: str = "text-image") -> float:
    """Returns the overlap of the densities of two modalities' router logits; 1 if they are equal."""
    return math.nan if result.experts is None else result.experts.overlap.get(pair, math.nan)


def apart(result: RunResult) -> float:
    """Returns the mean distance of experts 2 to N from expert 1 over its drift from the dense FFN after evolution."""
    experts = result.experts
    if experts is None or not experts.distance.get("evolving") or not experts.drift.get("evolving"):
        return math.nan
    return mean_distance(experts, "evolving") / experts.drift["evolving"]


def end_distance(result: RunResult) -> float:
    """Returns the mean distance of experts 2 to N from expert 1 over its norm, at the end of the last stage."""
    experts = result.experts
    return mean_distance(experts, list(experts.distance)[-1]) if experts and experts.distance else math.nan


def mean_distance(experts: ExpertFigures, stage: str) -> float:
    """Returns the mean distance of experts 2 to N from expert 1 over its norm; NaN for a single expert."""
    distances = experts.distance[stage]
    return sum(distances) / len(distances) if distances else math.nan

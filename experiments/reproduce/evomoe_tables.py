"""EvoMoE's tables: verdicts, scores by variant with the paper's for comparison, and diagnostics of experts."""

import math
from collections.abc import Callable, Mapping, Sequence

from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.report.tables import figure_text
from experiments.reproduce.claims import signed, told
from experiments.reproduce.collect import Results, mean_score
from experiments.reproduce.curves import domains_of
from experiments.reproduce.evomoe_claims import (
    BOTH,
    COPIES,
    KINDS,
    LINEAR_SLOTS,
    PAPER_ROWS,
    Finding,
    apart,
    end_distance,
    overlap,
    shuffle_cost,
)
from experiments.reproduce.papers import evomoe_scores
from experiments.reproduce.run_result import RunResult
from experiments.reproduce.statistics import summarise
from experiments.reproduce.tables import VERDICTS_TITLE, spread

PAIRS = ("text-image", "text-audio", "text-video", "image-video")
_REFERENCES = {  # the reference of a table's differences; routers are compared with the linear one of the same experts
    "evomoe-components": COPIES,
    "evomoe-diversity": BOTH,
    "evomoe-beta": BOTH,
    "evomoe-experts": BOTH,
    "evomoe-slots": LINEAR_SLOTS,
}
TITLES = {
    "evomoe-components": "Components",
    "evomoe-routers": "Routers",
    "evomoe-diversity": "Diversity of experts",
    "evomoe-beta": "How the others follow expert 1",
    "evomoe-experts": "Number of experts, and of those a token takes",
    "evomoe-slots": "Variable slots with DTR (ours)",
}
_FOUR_BENCHMARKS = ("evomoe-routers", "evomoe-diversity")


def finding_table(findings: Sequence[Finding]) -> TextTable:
    """Returns a row per claim: verdict, effect with its interval, seeds, the paper's figures, and effects by domain."""
    rows = [
        (
            one.claim.statement,
            one.claim.verdict,
            told(one.claim),
            str(one.claim.effect.n),
            one.paper or "-",
            one.claim.evidence or "-",
        )
        for one in findings
    ]
    columns = ("claim", "verdict", "difference in points, or as told (95%)", "seeds", "paper, %", "by domain")
    return TextTable(VERDICTS_TITLE, columns, tuple(rows))


def variant_table(name: str, results: Results) -> TextTable:
    """Returns every variant's score by domain, its paired difference to the reference, and the paper's average."""
    domains, rows = domains_of(results), []
    for variant in _variants(results):
        ones = [result for (found, _), result in results.found.items() if found == variant]
        scores = [_percent(ones, lambda r, d=domain: mean_score(r, None, (d,))) for domain in domains]
        reference = reference_of(name, variant)
        change = results.paired([variant, reference], lambda a, b: mean_score(a) - mean_score(b))
        difference = "-" if variant == reference or not change else signed(summarise(change))
        rows.append((variant, *scores, _percent(ones, mean_score), difference, str(len(ones)), _paper(name, variant)))
    columns = ("", *domains, "mean", f"against {against(name)} (95%)", "seeds", "paper, %")
    return TextTable(f"{TITLES[name]}. Score in percent", columns, tuple(rows))


def against(name: str) -> str:
    """Describes the reference of the table `name` in words."""
    return _REFERENCES.get(name, "the linear router")


def reference_of(name: str, variant: str) -> str:
    """Returns the variant that `variant` is compared with in the table `name`."""
    if name in _REFERENCES:
        return _REFERENCES[name]
    return next(f"{kind} + linear" for kind in KINDS if variant.startswith(kind))


def _paper(name: str, variant: str) -> str:
    """Returns the paper's average over all its benchmarks; for routers and diversity, over the four it gives there."""
    row = PAPER_ROWS.get(variant)
    if name in _FOUR_BENCHMARKS:
        row = {"evolution + linear": "linear", BOTH: "dtr", "MoE-tuning + DTR": None}.get(variant, row)
    return "-" if row is None else f"{evomoe_scores()[row]:.1f}"


def expert_table(results: Results) -> TextTable:
    """Returns the diagnostics: cost of shuffling, each expert alone, distances, overlap of logits by modality."""
    rows = []
    for variant in _variants(results):
        ones = [r for (name, _), r in results.found.items() if name == variant and r.experts is not None]
        if not ones:
            continue
        figures: Mapping[str, tuple[Callable[[RunResult], float], str]] = {
            "loss": (lambda r: r.experts.loss if r.experts else math.nan, ".3f"),
            "shuffled": (shuffle_cost, "+.4f"),
            "alone": (_spread_alone, ".4f"),
            "norm": (end_distance, ".1e"),
            "drift": (apart, ".1e"),
            **{pair: (lambda r, p=pair: overlap(r, p), ".2f") for pair in PAIRS},
        }
        cells = [_mean_and_range(ones, figure, form) for figure, form in figures.values()]
        rows.append((variant, *cells, str(len(ones))))
    columns = ("", "loss", "shuffling costs", "best to worst expert alone", "distance / norm", "distance / drift")
    title = (
        "Experts and routers at the end: validation loss in nats, what shuffling the router's logits adds to it, "
        "distances of experts 2 to N from expert 1, overlap of logits by modality; mean (least to most of the seeds)"
    )
    return TextTable(title, (*columns, *PAIRS, "seeds"), tuple(rows))


def _spread_alone(result: RunResult) -> float:
    alone = result.experts.alone if result.experts else ()
    return max(alone) - min(alone) if alone else math.nan


def _mean_and_range(ones: Sequence[RunResult], figure: Callable[[RunResult], float], form: str) -> str:
    values = [value for value in map(figure, ones) if not math.isnan(value)]
    if not values:
        return "-"
    mean = figure_text(sum(values) / len(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def _percent(ones: Sequence[RunResult], figure: Callable[[RunResult], float]) -> str:
    return spread(summarise([100 * figure(one) for one in ones]), 1)


def _variants(results: Results) -> list[str]:
    return list(dict.fromkeys(name for name, _ in results.found))

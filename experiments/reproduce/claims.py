"""The paper's claims, each with a verdict by a rule that was fixed before the results were seen.

A claim that something is better is supported if the interval of the difference lies above 0; not supported if it lies
below `BETTER_MARGIN`, which excludes a gain worth having; else undecided. A claim that two are equal is supported if
the interval of the difference lies above -`EQUAL_MARGIN`; not supported if it lies below; else undecided. Both take
differences paired by seed, in scores of 0 to 1, averaged over domains. With fewer than `MIN_SEEDS` seeds the verdict is
undecided.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from experiments.reproduce.collect import Results, mean_score
from experiments.reproduce.curves import (
    DYNAMIC,
    SALIENCE,
    STATIC,
    domains_of,
    gains,
    one_checkpoint,
    retrained,
)
from experiments.reproduce.run_result import RunResult
from experiments.reproduce.statistics import Summary, summarise

BETTER_MARGIN = 0.01
EQUAL_MARGIN = 0.02
MIN_SEEDS = 3
MEDIA, TEXT = ("general", "video"), ("ocr", "nlp")  # image and video, and text, as the paper's domains have them
FULL, LESS_MEDIA, LESS_TEXT = 8.0, 4.8, 7.2  # nominal budgets: all, 40% and 10% fewer real experts
# A static top-k cut by at least as much: if it loses nothing either, the verdict is about the tasks, not the method.
CONTROLS = {LESS_MEDIA: 4.0, LESS_TEXT: 6.0}

Verdict = Literal["supported", "not supported", "undecided at this scale"]

Unit = Literal["score", "AUC", "nats", "overlap", "drift"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim with its measurements."""

    statement: str
    verdict: Verdict
    effect: Summary  # the quantity that the verdict judges
    unit: Unit
    evidence: str
    limit: float = 0.0  # subtracted in the effect; reports show the figure without it


def better(effect: Summary) -> Verdict:
    """Returns the verdict on a claim that a difference is above 0."""
    if effect.n < MIN_SEEDS:
        return "undecided at this scale"
    if effect.low > 0:
        return "supported"
    return "not supported" if effect.high < BETTER_MARGIN else "undecided at this scale"


def equal(effect: Summary) -> Verdict:
    """Returns the verdict on a claim that nothing is lost: that a difference is not below -EQUAL_MARGIN."""
    if effect.n < MIN_SEEDS:
        return "undecided at this scale"
    if effect.low > -EQUAL_MARGIN:
        return "supported"
    return "not supported" if effect.high < -EQUAL_MARGIN else "undecided at this scale"


def all_claims(figure3: Results, table3: Results) -> list[Claim]:
    """Returns the claims of Figure 3 (budgets) and Table 3 (ablations) whose runs are done."""
    found: list[Claim] = []
    if figure3.found:
        found += [*_dynamic_beats_static(figure3), *_cheaper(figure3), *_meaning(figure3)]
    if table3.found:
        found += _ablations(table3)
    return found


def _dynamic_beats_static(results: Results) -> list[Claim]:
    static, static_retrained = one_checkpoint(results, STATIC, ""), retrained(results, "static", "")
    pairs = (
        ("retrained for each budget", retrained(results, "dynamic", ""), static_retrained),
        ("retrained for each budget, by salience (ours)", retrained(results, "salience", ""), static_retrained),
        ("one checkpoint", one_checkpoint(results, DYNAMIC, ""), static),
        ("one checkpoint, by salience (ours)", one_checkpoint(results, SALIENCE, ""), static),
    )
    found = []
    for how, ours, theirs in pairs:
        if set(ours.points) & set(theirs.points):
            effect = summarise(gains(ours, theirs))
            parts = {name: summarise(gains(ours, theirs, name)) for name in domains_of(results)}
            statement = f"Dynamic beats static at equal real experts: {how}"
            found.append(Claim(statement, better(effect), effect, "score", _parts_text(parts)))
    return found


def _cheaper(results: Results) -> list[Claim]:
    cuts = (("40% fewer real experts, image and video", LESS_MEDIA, MEDIA), ("10% fewer, text", LESS_TEXT, TEXT))
    found = []
    for what, budget, wanted in cuts:
        domains = [name for name in domains_of(results) if name in wanted]
        for variant, how in ((DYNAMIC, ""), (SALIENCE, ", by salience (ours)")):
            if domains and results.has(variant):
                lost = functools.partial(_lost, budget)
                statement = f"{what}, one checkpoint: the same score{how}"
                claim = _claim(statement, equal, "score", results, (variant,), lost, domains)
                realised = (_mean(results.paired([variant], lambda r, b=b: r.at(b).realised)) for b in (budget, FULL))
                note = "; realised {:.2f} against {:.2f}".format(*realised)
                note += _control(results, CONTROLS[budget], domains)
                found.append(dataclasses.replace(claim, evidence=claim.evidence + note))
    return found


def _control(results: Results, top_k: float, domains: Sequence[str]) -> str:
    """Tells how much the same domains lose if a static top-8 is cut to `top_k`."""
    if not results.has(STATIC):
        return ""
    lost = summarise(results.paired([STATIC], functools.partial(_lost, top_k, domains)))
    return f"; control, static {FULL:g} cut to {top_k:g}: {signed(lost)}"


def _lost(budget: float, domains: Sequence[str], result: RunResult) -> float:
    return mean_score(result, budget, domains) - mean_score(result, FULL, domains)


def _ablations(results: Results) -> list[Claim]:
    cases = (("Hidden-state modulation helps", "without HSM"), ("Importance-aware routing helps", "without IAR"))
    return [
        _claim(what, better, "score", results, (DYNAMIC, without), _gained, domains_of(results))
        for what, without in cases
        if results.seeds(DYNAMIC, without)
    ]


def _gained(domains: Sequence[str], ours: RunResult, without: RunResult) -> float:
    return mean_score(ours, None, domains) - mean_score(without, None, domains)


def _meaning(results: Results) -> list[Claim]:
    """Makes claims on importance's AUC for the tokens that carry the answer, minus chance (0.5), mean of modalities."""
    found = []
    for variant, how in ((DYNAMIC, "the paper's terms"), (SALIENCE, "by salience (ours)")):
        if results.has(variant):
            first = results.found[variant, results.seeds(variant)[0]]
            modalities = [one.modality for one in first.separations]
            statement = f"Importance follows meaning: {how}"
            found.append(_claim(statement, better, "AUC", results, (variant,), _above_chance, modalities))
    return found


def _above_chance(modalities: Sequence[str], result: RunResult) -> float:
    return _mean([auc(result, name) for name in modalities]) - 0.5


def _claim(
    statement: str,
    judge: Callable[[Summary], Verdict],
    unit: Unit,
    results: Results,
    variants: Sequence[str],
    figure: Callable[..., float],
    parts: Sequence[str],
) -> Claim:
    """Makes the claim about `figure(parts, *results of one seed)` for all parts, with each part alone as evidence."""

    def effect(chosen: Sequence[str]) -> Summary:
        return summarise(results.paired(variants, functools.partial(figure, chosen)))

    whole = effect(parts)
    return Claim(statement, judge(whole), whole, unit, _parts_text({name: effect((name,)) for name in parts}))


def auc(result: RunResult, modality: str) -> float:
    """Returns importance's AUC, mean of layers; NaN if the run did not measure it."""
    return next((one.auc for one in result.separations if one.modality == modality), math.nan)


def _parts_text(found: Mapping[str, Summary]) -> str:
    return ", ".join(f"{name} {signed(one)}" for name, one in found.items())


def told(claim: Claim) -> str:
    """Formats the claim's figure with its interval: a difference of scores in points, others with their unit."""
    if claim.unit == "nats":
        return f"{_interval(claim.effect, '+.3f')} nats"
    if claim.unit == "overlap":
        return f"{_interval(claim.effect, '+.3f')} of overlap"
    if claim.unit == "drift":
        return f"{_interval(claim.effect, '.1%', claim.limit)} of expert 1's drift (above {claim.limit:.0%} is apart)"
    return signed(claim.effect) + (" of AUC above 50" if claim.unit == "AUC" else "")


def signed(one: Summary) -> str:
    """Formats mean and interval in hundredths with signs; a dash if there is none."""
    hundredths = dataclasses.replace(one, mean=100 * one.mean, low=100 * one.low, high=100 * one.high)
    return _interval(hundredths, "+.1f")


def _interval(one: Summary, form: str, limit: float = 0.0) -> str:
    if one.n == 0:
        return "-"
    mean, low, high = (format(value + limit, form) for value in (one.mean, one.low, one.high))
    return mean if math.isnan(one.low) else f"{mean} ({low} to {high})"


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan

"""Tables 1 to 3 and the table of verdicts: our figures over seeds, with the paper's for comparison."""

from collections.abc import Sequence

from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.report.tables import figure_text
from experiments.reproduce.claims import FULL, LESS_TEXT, Claim, signed, told
from experiments.reproduce.collect import Results, mean_score
from experiments.reproduce.curves import DYNAMIC, SALIENCE, Curve, all_curves, domains_of
from experiments.reproduce.papers import ablation_scores, audio_wer, budget_scores
from experiments.reproduce.run_result import RunResult
from experiments.reproduce.statistics import Summary, summarise

SPEECH = "speech"
VERDICTS_TITLE = "Verdicts"
_PAPER_NAMES = {  # our variant: the paper's column of Table 3
    DYNAMIC: "ours",
    "without HSM": "wo_hsm",
    "without IAR": "wo_iar",
    "alpha 0.005": "alpha_0.005",
    "alpha 0.05": "alpha_0.05",
    "alpha 0.1": "alpha_0.1",
    "rho_max 0.1": "beta_max_0.1",
    "rho_max 0.25": "beta_max_0.25",
    "wide MLP": "wide_mlp",
    "deep MLP": "deep_mlp",
}


def verdict_table(claims: Sequence[Claim]) -> TextTable:
    """Returns a row per claim: verdict, effect with its interval in points, seeds, and effects by part."""
    rows = [(one.statement, one.verdict, told(one), str(one.effect.n), one.evidence) for one in claims]
    columns = ("claim", "verdict", "difference in points (95%)", "seeds", "by domain or modality")
    return TextTable(VERDICTS_TITLE, columns, tuple(rows))


def wer_table(results: Results) -> TextTable:
    """Returns Table 1: word error rate of speech at each budget, of our curves and in the paper."""
    paper, rows = audio_wer(), []
    for curve in all_curves(results):
        kind = curve.name.split(",")[0].split(" ")[0]
        for index, point in enumerate(curve.points[curve.seeds[0]]):
            wers = [100 * (curve.points[seed][index].score(SPEECH).wer or 0.0) for seed in curve.seeds]
            known = paper.get((kind, round(point.nominal, 2))) if "salience" not in curve.name else None
            rows.append(
                (
                    curve.name,
                    f"{point.nominal:.1f}",
                    _realised(curve, index),
                    spread(summarise(wers), 1),
                    str(len(wers)),
                    "-" if known is None else f"{known:.2f}",
                )
            )
    columns = ("", "nominal", "realised", "word error rate, %", "seeds", "paper, %")
    return TextTable("Table 1. Speech against experts per token", columns, tuple(rows))


def curve_table(results: Results) -> TextTable:
    """Returns the figures behind Figure 3: every curve's score at every budget, by domain, in percent."""
    domains = domains_of(results)
    rows = []
    for curve in all_curves(results):
        for index, point in enumerate(curve.points[curve.seeds[0]]):
            scores = [
                spread(summarise([100 * value for value in curve.figures(index, domain)]), 1)
                for domain in (*domains, None)
            ]
            seeds = str(len(curve.seeds))
            rows.append((curve.name, f"{point.nominal:.1f}", _realised(curve, index), *scores, seeds))
    columns = ("", "nominal", "realised", *domains, "mean", "seeds")
    return TextTable("Figure 3. Score in percent, mean and standard deviation over seeds", columns, tuple(rows))


def budget_table(results: Results) -> TextTable:
    """Returns Table 2: the default budget against 10% less at inference, by question type, with the paper's."""
    paper, rows = budget_scores(), []
    for variant in (DYNAMIC, SALIENCE):
        if not results.has(variant):
            continue
        for domain in domains_of(results):
            first = results.found[variant, results.seeds(variant)[0]].own.score(domain)
            known = paper[domain, "Average"]
            cells = (f"{known[FULL]:.2f}", f"{known[LESS_TEXT]:.2f}")
            rows.append((f"{variant}: {domain}", *_drop(results, variant, domain, None), *cells))
            rows += [
                (f"{variant}: {domain}, {question}", *_drop(results, variant, domain, question), "", "")
                for question in first.by_question
            ]
    columns = ("", f"at {FULL:g}, %", f"at {LESS_TEXT:g}, %", "difference (95%)", "paper at 8.0", "paper at 7.2")
    title = "Table 2. The default budget against 10% less at inference (the paper's speech is word error rate)"
    return TextTable(title, columns, tuple(rows))


def _drop(results: Results, variant: str, domain: str, question: str | None) -> tuple[str, str, str]:
    """Returns a domain's or question type's score at the default budget, at 10% less, and the difference."""

    def score(result: RunResult, budget: float) -> float:
        found = result.at(budget).score(domain)
        return found.score if question is None else found.by_question[question].score

    have = [result for (name, _), result in results.found.items() if name == variant]
    if question is not None:
        have = [result for result in have if question in result.own.score(domain).by_question]
    at = [summarise([100 * score(result, budget) for result in have]) for budget in (FULL, LESS_TEXT)]
    difference = summarise([score(result, LESS_TEXT) - score(result, FULL) for result in have])
    return spread(at[0], 1), spread(at[1], 1), signed(difference)


def ablation_table(results: Results) -> TextTable:
    """Returns Table 3: every variant's score by domain, its paired difference to the default, the paper's averages."""
    domains, paper, rows = domains_of(results), ablation_scores(), []
    for variant in dict.fromkeys(name for name, _ in results.found):
        of_variant = [result for (name, _), result in results.found.items() if name == variant]
        scores = [
            spread(summarise([100 * mean_score(result, None, (domain,)) for result in of_variant]), 1)
            for domain in domains
        ]
        mean = spread(summarise([100 * mean_score(result) for result in of_variant]), 1)
        change = results.paired([variant, DYNAMIC], lambda a, b: mean_score(a) - mean_score(b))
        realised = summarise([result.own.realised for result in of_variant])
        difference = "-" if variant == DYNAMIC else signed(summarise(change))
        known = _PAPER_NAMES.get(variant)
        theirs = [f"{paper[domain, 'Average'][known]:.2f}" if known else "-" for domain in domains]
        rows.append(
            (variant, figure_text(realised.mean), *scores, mean, difference, str(len(of_variant)), " / ".join(theirs))
        )
    columns = ("", "realised", *domains, "mean", "against the default (95%)", "seeds", f"paper: {' / '.join(domains)}")
    return TextTable(
        "Table 3. Ablations, score in percent (the paper's speech is word error rate)", columns, tuple(rows)
    )


def separation_table(results: Results) -> TextTable:
    """Returns Figure 5's figures: AUC for the tokens that carry the answer, of importance, its layers and baselines."""
    rows = []
    for variant in dict.fromkeys(name for name, _ in results.found):
        of_variant = [result.separations for (name, _), result in results.found.items() if name == variant]
        of_variant = [found for found in of_variant if found]
        for index, first in enumerate(of_variant[0] if of_variant else ()):
            ones = [found[index] for found in of_variant]
            layers = [summarise([one.auc_by_layer[i] for one in ones]) for i in range(len(first.auc_by_layer))]
            beside = [summarise([one.baselines[name] for one in ones]) for name in first.baselines]
            mean = summarise([one.auc for one in ones])
            cells = (f"{mean.mean:.2f} ({mean.low:.2f} to {mean.high:.2f})", *(f"{one.mean:.2f}" for one in layers))
            rows.append((variant, first.modality, *cells, *(f"{one.mean:.2f}" for one in beside), str(len(ones))))
    first = next(found[0] for found in (r.separations for r in results.found.values()) if found)
    layers_named = tuple(f"layer {i}" for i in range(len(first.auc_by_layer)))
    columns = ("", "modality", "importance (95%)", *layers_named, *first.baselines, "seeds")
    return TextTable("Figure 5. ROC AUC against the tokens that carry the answer", columns, tuple(rows))


def spread(one: Summary, digits: int) -> str:
    """Formats mean and standard deviation."""
    return figure_text(one.mean, f".{digits}f") + ("" if one.n < 2 else f" ± {one.sd:.{digits}f}")


def _realised(curve: Curve, index: int) -> str:
    return figure_text(summarise([curve.points[seed][index].realised for seed in curve.seeds]).mean)

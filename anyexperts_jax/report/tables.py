"""The evaluation as tables, for the terminal and for the report."""

import math
from collections.abc import Sequence

from anyexperts_jax.core.text_table import TextTable, print_tables
from anyexperts_jax.data.scores import metric_label
from anyexperts_jax.evaluate.importance import Separation
from anyexperts_jax.evaluate.results import BudgetResult, EvaluationResult, RoutingSummary


def figure_text(value: float, form: str = ".2f") -> str:
    """The formatted number; "-" if it is undefined."""
    return "-" if math.isnan(value) else format(value, form)


def budget_table(result: EvaluationResult) -> TextTable:
    """One row per budget: the requested, nominal and realised budget, and its cost."""
    rows = []
    for one in result.budgets:
        k_min, k_max = one.routing.window
        rows.append(
            (
                f"{one.budget:g}",
                f"{k_min:.2f}-{k_max:.2f}",
                f"{one.nominal:.2f}",
                f"{one.realised:.2f}",
                f"{one.routing.virtual_share:.1%}",
                f"{max(one.routing.load_max_over_mean):.2f}",
                f"{one.routing.dropped}",
                f"{one.time.forward:.2f}",
                f"{one.time.layer:.2f}",
            )
        )
    reference = f"{result.budgets[0].time.reference:g}"
    columns = ("budget", "window", "nominal", "realised", "virtual share", "peak load", "dropped")
    title = f"Budgets (peak load: busiest expert over the mean; time 1: budget {reference})"
    return TextTable(title, (*columns, "forward time", "MoE time"), tuple(rows))


def score_table(result: EvaluationResult) -> TextTable:
    """One row per domain: chance, and the score at each budget with its standard error, in percent."""
    rows = []
    for index, first in enumerate(result.budgets[0].scores):
        scores = [one.scores[index] for one in result.budgets]
        cells = [f"{100 * score.score:.1f} ±{figure_text(100 * score.standard_error, '.1f')}" for score in scores]
        rows.append((first.domain, metric_label(first.metric), f"{100 * first.chance:.1f}", *cells))
    columns = ("domain", "metric", "chance", *(f"budget {one.budget:g}" for one in result.budgets))
    title = f"Score in percent on {examples_text(result)}"
    return TextTable(title, columns, tuple(rows), names=2)


def examples_text(result: EvaluationResult) -> str:
    """The number of scored examples: "64 test examples per domain", and in brackets the domains with fewer."""
    most = result.examples_per_domain
    fewer = [f"{one.domain} {one.examples}" for one in result.budgets[0].scores if one.examples < most]
    return f"{most} test examples per domain" + (f" ({', '.join(fewer)})" if fewer else "")


def likelihood_table(result: EvaluationResult) -> TextTable:
    """Three rows a domain: what the right answers cost at each budget, token by token."""
    rows = []
    for index, first in enumerate(result.budgets[0].scores):
        scores = [one.scores[index] for one in result.budgets]
        rows += [
            (first.domain, "loss, nats a token", *(figure_text(score.loss, ".3f") for score in scores)),
            (first.domain, "bits per byte", *(figure_text(score.bits_per_byte, ".3f") for score in scores)),
            (first.domain, "token accuracy, %", *(figure_text(100 * one.token_accuracy, ".1f") for one in scores)),
        ]
        if first.error_rate is not None:
            rates = (figure_text(100 * (score.error_rate or 0.0), ".1f") for score in scores)
            rows.append((first.domain, f"{first.metric.upper()} of all, %", *rates))
    columns = ("domain", "figure", *(f"budget {one.budget:g}" for one in result.budgets))
    title = "The right answers, each token predicted from those before; error rates are of generated answers"
    return TextTable(title, columns, tuple(rows), names=2)


def group_table(one: BudgetResult) -> TextTable:
    """One row per question type and level of each domain, at one budget."""
    rows = []
    for score in one.scores:
        groups = [(name, group) for name, group in score.by_question.items()]
        groups += [(f"level {level}", group) for level, group in score.by_level.items()]
        for name, group in groups:
            row = (f"{score.domain}, {name}", str(group.examples), f"{group.score:.1%}", f"{group.chance:.1%}")
            rows.append(row)
    return TextTable(
        f"By question type and level, at budget {one.budget:g}", ("group", "examples", "score", "chance"), tuple(rows)
    )


def allocation_table(result: EvaluationResult) -> TextTable:
    """Nominal real experts at each budget, and the realised ones by domain, modality and layer."""
    budgets = result.budgets
    rows = [
        ("nominal", *(f"{one.nominal:.2f}" for one in budgets)),
        ("realised, all tokens", *(f"{one.realised:.2f}" for one in budgets)),
    ]
    groups = {"domain": "real_slots_by_domain", "modality": "real_slots_by_modality"}
    rows += [
        (f"{label} {name}", *(f"{getattr(one.routing, field)[name]:.2f}" for one in budgets))
        for label, field in groups.items()
        for name in getattr(result.trained, field)
    ]
    rows += [
        (f"MoE layer {layer}", *(f"{one.routing.real_slots_by_layer[layer]:.2f}" for one in budgets))
        for layer in range(len(result.trained.real_slots_by_layer))
    ]
    columns = ("tokens", *(f"budget {one.budget:g}" for one in budgets))
    return TextTable("Real experts per token, by domain, modality and layer", columns, tuple(rows))


def separation_table(separations: Sequence[Separation]) -> TextTable:
    """One row per modality: the AUC of importance, and the mean importance of evidence and background tokens."""
    rows = []
    for one in separations:
        auc, low, high = (figure_text(value, ".3f") for value in (one.auc, one.auc_low, one.auc_high))
        means = (figure_text(value, ".3f") for value in (one.auc_within, one.mean_evidence, one.mean_background))
        rows.append((one.modality, f"{auc} ({low} to {high})", *means))
    columns = ("modality", "AUC (95% interval)", "within sequences", "mean on evidence", "mean on background")
    return TextTable("Importance against the tokens that carry the answer, ROC AUC", columns, tuple(rows))


def baseline_table(separations: Sequence[Separation]) -> TextTable:
    """One row per modality: the AUC of single layers and of untrained baselines, and the numbers of tokens compared."""
    layers = tuple(f"MoE layer {layer}" for layer in range(len(separations[0].auc_by_layer)))
    names = tuple(separations[0].baselines)
    rows = []
    for one in separations:
        aucs = (*one.auc_by_layer, *(one.baselines[name] for name in names))
        counts = (f"{one.evidence_tokens}", f"{one.background_tokens}", f"{one.sequences}")
        rows.append((one.modality, *(figure_text(auc, ".3f") for auc in aucs), *counts))
    columns = ("modality", *layers, *(f"{name} alone" for name in names))
    counted = ("evidence tokens", "background tokens", "sequences")
    return TextTable("ROC AUC by layer, and of what needs no training", (*columns, *counted), tuple(rows))


def routing_table(summary: RoutingSummary, modalities: Sequence[str]) -> TextTable:
    """One row per layer: real experts and virtual share by modality, and load."""
    present = [m for m, name in enumerate(modalities) if name in summary.real_slots_by_modality]
    rows = []
    for layer, real_M in enumerate(summary.real_slots_LM):
        share_M = summary.virtual_share_LM[layer]
        rows.append(
            (
                f"{layer}",
                *(figure_text(real_M[m]) for m in present),
                *(figure_text(share_M[m], ".1%") for m in present),
                f"{summary.load_max_over_mean[layer]:.2f}",
            )
        )
    real = tuple(f"{modalities[m]}" for m in present)
    share = tuple(f"{modalities[m]}, virtual share" for m in present)
    k_min, k_max = summary.window
    title = f"By layer, window {k_min:g} to {k_max:g}"
    return TextTable(title, ("MoE layer", *real, *share, "peak load"), tuple(rows))


def print_evaluation(result: EvaluationResult) -> None:
    """Prints scores, budgets, allocation and separation to the standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    print_tables((score_table(result), likelihood_table(result)), console)
    print_tables((budget_table(result), allocation_table(result)), console)
    if result.separations:
        print_tables([separation_table(result.separations)], console)
    else:
        console.print("No importance to compare with the answers' tokens: static top-k, or no evidence is marked.")

"""The evaluation as tables, for the terminal and for the report."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from anyexperts_jax.analysis.importance import Separation
from anyexperts_jax.analysis.results import BudgetResult, EvaluationResult, RoutingSummary

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of finished texts. The first column holds names; the others figures, right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def figure_text(value: float, form: str = ".2f") -> str:
    """The number in that form; "-" where it is undefined."""
    return "-" if math.isnan(value) else format(value, form)


def budget_table(result: EvaluationResult) -> TextTable:
    """A row a budget: what was asked, nominal and realised, and what it costs."""
    rows = []
    for one in result.budgets:
        k_min, k_max = one.routing.window
        rows.append(
            (
                f"{one.budget:g}",
                f"{k_min:.2f} to {k_max:.2f}",
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
    columns = ("budget", "window", "nominal", "realised", "virtual share", "load max/mean", "dropped")
    times = (f"forward time ({reference} = 1)", f"MoE experts' time ({reference} = 1)")
    return TextTable("Real experts per token, and what they cost", (*columns, *times), tuple(rows))


def score_table(result: EvaluationResult) -> TextTable:
    """A row a domain: chance, and the score at each budget."""
    rows = []
    for index, first in enumerate(result.budgets[0].scores):
        scores = [one.scores[index] for one in result.budgets]
        cells = [f"{score.score:.1%} ± {figure_text(100 * score.standard_error, '.1f')}" for score in scores]
        rows.append((first.domain, metric_name(first.metric), str(first.examples), f"{first.chance:.1%}", *cells))
    budgets = tuple(f"budget {one.budget:g}" for one in result.budgets)
    return TextTable("Score on the test split", ("domain", "metric", "examples", "chance", *budgets), tuple(rows))


def metric_name(metric: str) -> str:
    return {"exact": "exact match", "anls": "ANLS", "wer": "1 - WER"}[metric]


def group_table(one: BudgetResult) -> TextTable:
    """A row a question type and level of each domain, at one budget."""
    rows = []
    for score in one.scores:
        groups = [(name, group) for name, group in score.by_question.items()]
        groups += [(f"level {level}", group) for level, group in score.by_level.items()]
        for name, group in groups:
            row = (f"{score.domain}, {name}", str(group.examples), f"{group.score:.1%}", f"{group.chance:.1%}")
            rows.append(row)
    return TextTable(
        f"By question type and level, at budget {one.budget:g}", ("", "examples", "score", "chance"), tuple(rows)
    )


def allocation_table(result: EvaluationResult) -> TextTable:
    """A row a domain and a modality: realised real experts at each budget."""
    groups = {"domain": "real_slots_by_domain", "modality": "real_slots_by_modality"}
    rows = [
        (f"{label} {name}", *(f"{getattr(one.routing, field)[name]:.2f}" for one in result.budgets))
        for label, field in groups.items()
        for name in getattr(result.trained, field)
    ]
    budgets = tuple(f"budget {one.budget:g}" for one in result.budgets)
    return TextTable("Realised real experts per token, by domain and modality", ("", *budgets), tuple(rows))


def separation_table(separations: Sequence[Separation], brief: bool = False) -> TextTable:
    """A row a modality: AUC of importance and of what needs no training, and mean importance.

    `brief` leaves out counts, layers and baselines.
    """
    rows = [_separation_cells(one) for one in separations]
    kept = [name for name in rows[0] if not brief or name in _BRIEF] if rows else []
    title = "Importance against the tokens that carry the answer, ROC AUC"
    return TextTable(title, tuple(kept), tuple(tuple(row[name] for name in kept) for row in rows))


_BRIEF = ("modality", "AUC (95% interval)", "within sequences", "mean on evidence", "mean on background")


def _separation_cells(one: Separation) -> dict[str, str]:
    auc, low, high = (figure_text(value, ".3f") for value in (one.auc, one.auc_low, one.auc_high))
    return {
        "modality": one.modality,
        "AUC (95% interval)": f"{auc} ({low} to {high})",
        "within sequences": figure_text(one.auc_within, ".3f"),
        "mean on evidence": figure_text(one.mean_evidence, ".3f"),
        "mean on background": figure_text(one.mean_background, ".3f"),
        **{f"MoE layer {layer}": figure_text(value, ".3f") for layer, value in enumerate(one.auc_by_layer)},
        **{f"{name} alone": figure_text(value, ".3f") for name, value in one.baselines.items()},
        "sequences": f"{one.sequences}",
        "evidence tokens": f"{one.evidence_tokens}",
        "background tokens": f"{one.background_tokens}",
    }


def routing_table(summary: RoutingSummary, modalities: Sequence[str]) -> TextTable:
    """A row a layer: real experts by modality, virtual share and load."""
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
    return TextTable(title, ("MoE layer", *real, *share, "load max/mean"), tuple(rows))


def to_rich(table: TextTable) -> "Table":
    from rich.table import Table

    drawn = Table(title=table.title, title_justify="left")
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if index else "left")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def print_evaluation(result: EvaluationResult) -> None:
    """Prints scores, budgets, allocation and separation to the terminal."""
    from rich.console import Console

    console = Console()
    for table in (score_table(result), budget_table(result), allocation_table(result)):
        console.print(to_rich(table))
    if result.separations:
        console.print(to_rich(separation_table(result.separations, brief=True)))
    else:
        console.print("static top-k: no importance to compare with the answers' tokens")

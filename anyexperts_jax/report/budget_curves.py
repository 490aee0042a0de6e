"""Charts of each domain's score against the budget: nominal, realised, and measured time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anyexperts_jax.evaluate.results import BudgetResult, EvaluationResult
from anyexperts_jax.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_budget_curves(result: EvaluationResult, path: Path) -> Path:
    """Three panels with a line per domain, error bars of one standard error, and chance as a tick at the left edge."""
    budgets = sorted(result.budgets, key=lambda one: one.realised)
    reference = budgets[0].time.reference
    axes_of = (
        ("nominal real experts per token", [one.nominal for one in budgets]),
        ("realised real experts per token", [one.realised for one in budgets]),
        (f"forward time, 1 = budget {reference:g}", [one.time.forward for one in budgets]),
    )
    domains = [score.domain for score in budgets[0].scores]
    with style.figure(8.0, 3.5, path) as drawn:
        panels = drawn.subplots(1, len(axes_of), sharey=True)
        for axes, (label, places) in zip(panels, axes_of, strict=True):
            for index, domain in enumerate(domains):
                _draw_line(axes, index, domain, places, budgets)
            axes.set_xlabel(label)
            axes.grid(True)
        panels[0].set_ylabel("score")
        panels[0].set_ylim(0, None)
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside upper left", ncols=len(domains))
    return path


def _draw_line(axes: "Axes", index: int, domain: str, places: Sequence[float], budgets: Sequence[BudgetResult]) -> None:
    colour, marker = style.series(index)
    scores = [next(score for score in one.scores if score.domain == domain) for one in budgets]
    axes.errorbar(
        places,
        [score.score for score in scores],
        [score.standard_error for score in scores],
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1.8,
        elinewidth=1,
        label=style.label(domain),
    )
    axes.axhline(scores[0].chance, xmax=0.06, color=colour, linewidth=2.5, alpha=0.7)

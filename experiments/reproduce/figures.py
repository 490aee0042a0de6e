"""Draws Figure 3's curves and Figure 5's areas under the curve."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anyexperts_jax.report import style
from experiments.reproduce.collect import Results
from experiments.reproduce.curves import Curve, all_curves, domain_score, domains_of
from experiments.reproduce.layer_times import LayerTimes
from experiments.reproduce.run_result import BudgetScores
from experiments.reproduce.statistics import interpolate, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = Callable[[Curve, BudgetScores], float]


def draw_curves(results: Results, path: Path, times: LayerTimes | None, title: str, *, all_axes: bool = True) -> Path:
    """Draws score against budget, a column per domain and a row for each of three x axes, or the realised budget only.

    Bars are 95% intervals of the mean over seeds after subtracting each seed's level, its mean over all points: seeds
    differ more than variants, and the comparison is within seeds. Layer times are those of another, stated, size
    (`LayerTimes`).
    """
    curves, domains = all_curves(results), [*domains_of(results), None]
    levels = {domain: seed_levels(curves, domain) for domain in domains}
    axes_of: list[tuple[str, Place]] = [("realised real experts per token", lambda curve, point: point.realised)]
    if all_axes:
        axes_of.insert(0, ("nominal real experts per token", lambda curve, point: point.nominal))
    if all_axes and times is not None:
        label = f"time of one layer of {times.shape}, 1 = static 8"
        axes_of.append((label, lambda curve, point: _layer_time(times, curve, point)))
    with style.figure(13.0, 1.1 + 2.35 * len(axes_of), path) as drawn:
        grid = drawn.subplots(len(axes_of), len(domains), squeeze=False, sharey="col")
        for row, (label, place) in zip(grid, axes_of, strict=True):
            for axes, domain in zip(row, domains, strict=True):
                for index, curve in enumerate(curves):
                    _draw_curve(axes, index, curve, domain, levels[domain], place)
                axes.grid(True)
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
            row[len(domains) // 2].set_xlabel(label)
        for axes, domain in zip(grid[0], domains, strict=True):
            axes.set_title("mean of domains" if domain is None else domain)
        handles, labels = grid[0][0].get_legend_handles_labels()
        whole, columns = f"{title.removesuffix('.')}; bars are 95% over seeds, within a seed", min(len(curves), 3)
        drawn.legend(handles, labels, loc="outside upper left", ncols=columns, title=whole, alignment="left")
    return path


def seed_levels(curves: Sequence[Curve], domain: str | None) -> dict[int, float]:
    """Returns how far each seed's mean over all points of all curves is above the mean of all seeds."""
    scores: dict[int, list[float]] = {}
    for curve in curves:
        for seed, points in curve.points.items():
            scores.setdefault(seed, []).extend(domain_score(point, domain) for point in points)
    means = {seed: float(np.mean(found)) for seed, found in scores.items()}
    return {seed: mean - float(np.mean(list(means.values()))) for seed, mean in means.items()}


def _draw_curve(
    axes: "Axes", index: int, curve: Curve, domain: str | None, levels: Mapping[int, float], place: Place
) -> None:
    colour, marker = style.series(index)
    count = len(curve.points[curve.seeds[0]])
    own = [levels[seed] for seed in curve.seeds]
    found = [summarise([a - b for a, b in zip(curve.figures(i, domain), own, strict=True)]) for i in range(count)]
    xs = [float(np.mean([place(curve, curve.points[seed][i]) for seed in curve.seeds])) for i in range(count)]
    means = np.array([one.mean for one in found])
    reach = [np.nan_to_num(means - [one.low for one in found]), np.nan_to_num([one.high for one in found] - means)]
    moved = "one checkpoint" in curve.name
    axes.errorbar(
        xs,
        means,
        reach,
        color=colour,
        marker=marker,
        markersize=4.5,
        linewidth=1.5,
        linestyle="--" if moved else "-",
        elinewidth=0.8,
        label=f"{curve.name} ({_seeds(len(curve.seeds))})",
    )


def _layer_time(times: LayerTimes, curve: Curve, point: BudgetScores) -> float:
    """Returns the layer time interpolated between measured points over static top-8's; NaN outside their range."""
    points = times.static if curve.name.startswith("static") else times.dynamic
    known_x, known_y = zip(*points, strict=True)
    return interpolate(point.realised, known_x, known_y) / times.reference


def draw_separations(results: Results, variants: Sequence[str], path: Path, title: str) -> Path:
    """Draws importance's AUC for the tokens that carry the answer: a panel per variant, marks grouped by modality."""
    present = [name for name in variants if any(v == name and r.separations for (v, _), r in results.found.items())]
    with style.figure(9.0, 0.9 + 2.6 * len(present), path) as drawn:
        grid = drawn.subplots(len(present), 1, squeeze=False, sharex=True)[:, 0]
        for axes, variant in zip(grid, present, strict=True):
            found = [r.separations for (v, _), r in results.found.items() if v == variant]
            _draw_areas(axes, found)
            axes.set_title(f"{variant} ({_seeds(len(found))})")
        grid[-1].set_xlabel("ROC AUC against the tokens that carry the answer; 0.5 is chance; bars are 95% over seeds")
        handles, labels = grid[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside upper left", ncols=5, title=title, alignment="left")
    return path


def _draw_areas(axes: "Axes", found: Sequence[Sequence[object]]) -> None:
    from anyexperts_jax.evaluate.importance import Separation

    by_modality: list[list[Separation]] = [list(ones) for ones in zip(*found, strict=True)]  # type: ignore[arg-type]
    for row, ones in enumerate(by_modality):
        mean = summarise([one.auc for one in ones])
        reach = np.nan_to_num([[mean.mean - mean.low], [mean.high - mean.mean]])
        label = "importance, mean of layers" if row == 0 else None
        axes.errorbar(mean.mean, row - 0.15, xerr=reach, fmt="o", color=style.SERIES[1], capsize=3, label=label)
        layers = [summarise([one.auc_by_layer[i] for one in ones]).mean for i in range(len(ones[0].auc_by_layer))]
        label = "single layers" if row == 0 else None
        axes.plot(layers, np.full(len(layers), row), ".", color=style.SERIES[1], label=label)
        for index, name in enumerate(ones[0].baselines):
            colour, marker = style.SERIES[(index + 2) % len(style.SERIES)], "sD^vPX*"[index % 7]
            value = summarise([one.baselines[name] for one in ones]).mean
            axes.plot(value, row + 0.2, marker, color=colour, markersize=5, label=name if row == 0 else None)
    axes.axvline(0.5, color=style.FAINT, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(by_modality)), [ones[0].modality for ones in by_modality])
    axes.set_ylim(len(by_modality) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(True, axis="x")


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"

"""EvoMoE's pictures: scores of all variants, and the cost of shuffling against the distance between experts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anyexperts_jax.report import style
from experiments.reproduce.collect import Results, mean_score
from experiments.reproduce.evomoe_claims import end_distance, overlap, shuffle_cost
from experiments.reproduce.evomoe_tables import TITLES, against, reference_of
from experiments.reproduce.statistics import summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KIND_NAMES = ("evolution", "snapshots (ours)", "others")
_OTHER = 2
_LEAST_DISTANCE = 1e-8  # the place of equal experts on the logarithmic axis


def draw_scores(tables: Mapping[str, Results], path: Path, title: str) -> Path:
    """Draws a panel per table and a row per variant: its gain over the table's reference, for every seed and the mean.

    Seeds differ more than variants, so each is compared with the reference of the same seed.
    """
    sizes = [max(len({name for name, _ in one.found}), 1) for one in tables.values()]
    with style.figure(9.0, 0.6 + 0.26 * sum(sizes) + 0.3 * len(sizes), path) as drawn:
        grid = drawn.subplots(len(sizes), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": sizes})[:, 0]
        for axes, (name, results) in zip(grid, tables.items(), strict=True):
            variants = list(dict.fromkeys(variant for variant, _ in results.found))
            labels = []
            for row, variant in enumerate(variants):
                scores = [100 * mean_score(one) for (found, _), one in results.found.items() if found == variant]
                labels.append(f"{variant}  {sum(scores) / len(scores):.1f}%")
                _draw_gain(axes, row, results, variant, reference_of(name, variant))
            axes.axvline(0.0, color=style.FAINT, linewidth=1)
            axes.set_yticks(range(len(variants)), labels)
            axes.set_ylim(len(variants) - 0.5, -0.5)
            axes.set_title(f"{TITLES[name]}: against {against(name)}")
            axes.grid(True, axis="x")
        grid[-1].set_xlabel(
            "points above the reference of the same seed, mean of domains; dots are seeds, bars 95% intervals"
        )
        drawn.suptitle(f"{title.removesuffix('.')}; beside the names mean scores", x=0.01, ha="left")
    return path


def _draw_gain(axes: "Axes", row: int, results: Results, variant: str, reference: str) -> None:
    if variant == reference:
        axes.plot(0.0, row, "o", color=style.SERIES[0], markerfacecolor="white", markersize=5)
        return
    gains = results.paired([variant, reference], lambda a, b: 100 * (mean_score(a) - mean_score(b)))
    if gains:
        mean = summarise(gains)
        reach = np.nan_to_num([[mean.mean - mean.low], [mean.high - mean.mean]])
        axes.plot(gains, np.full(len(gains), row), ".", color=style.FAINT)
        axes.errorbar(mean.mean, row, xerr=reach, fmt="o", color=style.SERIES[0], capsize=3, markersize=5)


def draw_experts(results: Results, path: Path, title: str) -> Path:
    """Draws the cost of shuffling against the distance between experts, and the overlap of logits by modality."""
    variants = list(dict.fromkeys(name for (name, _), one in results.found.items() if one.experts))
    every = [abs(shuffle_cost(one)) for one in results.found.values() if one.experts]
    named_from = 0.1 * max(every, default=0.0)  # names on the zero line would overlap
    means: dict[str, tuple[float, float]] = {}
    with style.figure(11.0, max(4.4, 0.9 + 0.15 * len(variants)), path) as drawn:
        left, right = drawn.subplots(1, 2)
        for index, variant in enumerate(variants):
            ones = [one for (name, _), one in results.found.items() if name == variant and one.experts]
            colour, marker = style.series(_kind(variant))
            placed = [one for one in ones if not math.isnan(end_distance(one))]
            distances = [max(end_distance(one), _LEAST_DISTANCE) for one in placed]
            costs = [shuffle_cost(one) for one in placed]
            if distances:
                left.plot(distances, costs, marker, color=colour, markersize=4)
            if distances and _kind(variant) == _OTHER and abs(np.mean(costs)) > named_from:
                means[variant] = (float(np.exp(np.mean(np.log(distances)))), float(np.mean(costs)))
            right.plot([overlap(one) for one in ones], np.full(len(ones), index), marker, color=colour, markersize=4)
        for kind, name in enumerate(_KIND_NAMES):
            colour, marker = style.series(kind)
            left.plot([], [], marker, color=colour, markersize=5, label=name)
        left.set_xscale("log")
        left.axhline(0.0, color=style.FAINT, linewidth=1)
        _name(left, means)
        left.xaxis.set_major_formatter(
            "{x:g}"
        )  # the default formatter writes powers as formulas, which `style` turns off
        left.xaxis.set_minor_formatter("")  # only decades have labels
        left.set_xlabel("distance of experts 2 to N from expert 1 over its norm")
        left.set_ylabel("nats per answer token that shuffled logits cost")
        right.set_yticks(range(len(variants)), variants)
        right.set_ylim(len(variants) - 0.5, -0.5)
        right.tick_params(axis="y", labelsize=6.5)
        right.set_xlabel("overlap of router logits of text and image; 1 is alike")
        for axes in (left, right):
            axes.grid(True)
        drawn.legend(
            loc="outside upper left", ncols=len(_KIND_NAMES), title=f"{title}; a mark a seed", alignment="left"
        )
    return path


def _name(axes: "Axes", points: Mapping[str, tuple[float, float]]) -> None:
    """Writes the points' names in a column to the left of experts that differ, with a line to each point."""
    low, high = axes.get_ylim()
    names = sorted(points, key=lambda name: points[name][1])
    heights = _apart([points[name][1] for name in names], gap=0.03 * (high - low))
    for name, height in zip(names, heights, strict=True):
        axes.annotate(
            name,
            points[name],
            xytext=(0.62, height),
            textcoords=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=6.5,
            arrowprops={"arrowstyle": "-", "color": style.FAINT, "linewidth": 0.6},
        )


def _apart(ascending: Sequence[float], gap: float) -> list[float]:
    """Returns the numbers moved so that neighbours are at least `gap` apart, keeping their mean."""
    moved: list[float] = []
    for number in ascending:
        moved.append(max(number, moved[-1] + gap) if moved else number)
    shift = (sum(moved) - sum(ascending)) / max(len(moved), 1)
    return [number - shift for number in moved]


def _kind(variant: str) -> int:
    """Returns the variant's index in `_KIND_NAMES`."""
    return next((i for i, start in enumerate(("evolution", "snapshots")) if variant.startswith(start)), _OTHER)

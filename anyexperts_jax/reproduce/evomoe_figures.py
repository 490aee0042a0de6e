"""EvoMoE's pictures: scores of all variants, and what shuffling costs against how far experts end apart."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from anyexperts_jax.analysis import style
from anyexperts_jax.reproduce.collect import Results, mean_score
from anyexperts_jax.reproduce.evomoe_claims import apart, overlap, shuffle_cost
from anyexperts_jax.reproduce.statistics import summarise

_LEAST_DISTANCE = 1e-8  # where experts that are alike stand on the logarithmic axis


def draw_scores(tables: Mapping[str, Results], path: Path, title: str) -> Path:
    """A panel a table, a row a variant: the mean over domains and seeds with its interval, and every seed."""
    sizes = [max(len({name for name, _ in one.found}), 1) for one in tables.values()]
    with style.figure(9.0, 0.6 + 0.26 * sum(sizes) + 0.3 * len(sizes), path) as drawn:
        grid = drawn.subplots(len(sizes), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": sizes})[:, 0]
        for axes, (name, results) in zip(grid, tables.items(), strict=True):
            variants = list(dict.fromkeys(variant for variant, _ in results.found))
            for row, variant in enumerate(variants):
                scores = [100 * mean_score(one) for (found, _), one in results.found.items() if found == variant]
                mean = summarise(scores)
                reach = np.nan_to_num([[mean.mean - mean.low], [mean.high - mean.mean]])
                axes.plot(scores, np.full(len(scores), row), ".", color=style.FAINT)
                axes.errorbar(mean.mean, row, xerr=reach, fmt="o", color=style.SERIES[0], capsize=3, markersize=5)
            axes.set_yticks(range(len(variants)), variants)
            axes.set_ylim(len(variants) - 0.5, -0.5)
            axes.set_title(name)
            axes.grid(True, axis="x")
        grid[-1].set_xlabel("score in percent, mean of domains; dots are seeds, bars 95% intervals of their mean")
        drawn.suptitle(title, x=0.01, ha="left")
    return path


def draw_experts(results: Results, path: Path, title: str) -> Path:
    """What shuffling costs against the distance of evolved experts, and the overlap of logits by modality."""
    with style.figure(11.0, 4.6, path) as drawn:
        left, right = drawn.subplots(1, 2)
        variants = list(dict.fromkeys(name for name, _ in results.found))
        with_experts = [
            name for name in variants if any(v == name and r.experts for (v, _), r in results.found.items())
        ]
        for index, variant in enumerate(with_experts):
            ones = [one for (name, _), one in results.found.items() if name == variant]
            colour, marker = style.series(index)
            xs = [max(apart(one), _LEAST_DISTANCE) for one in ones]
            if np.isfinite(xs).any():
                left.plot(xs, [shuffle_cost(one) for one in ones], marker, color=colour, label=variant, markersize=5)
            shared = [overlap(one) for one in ones]
            right.plot(shared, np.full(len(ones), index), marker, color=colour, markersize=5)
        left.set_xscale("log")
        left.axhline(0.0, color=style.FAINT, linewidth=1)
        left.set_xlabel("distance of experts 2 to N from expert 1 over expert 1's drift")
        left.set_ylabel("nats per answer token that shuffled logits cost")
        right.set_yticks(range(len(with_experts)), with_experts)
        right.set_ylim(len(with_experts) - 0.5, -0.5)
        right.tick_params(axis="y", labelsize=6)
        right.set_xlabel("overlap of router logits of text and image; 1 is alike")
        for axes in (left, right):
            axes.grid(True)
        if left.get_legend_handles_labels()[0]:
            drawn.legend(loc="outside lower center", ncols=4, fontsize=6.5)
        drawn.suptitle(title, x=0.01, ha="left")
    return path

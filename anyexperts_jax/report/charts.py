"""Charts of the report: training, real experts per modality, load, and importance against the evidence."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from anyexperts_jax.core.modality import MODALITY_NAMES
from anyexperts_jax.evaluate.importance import Separation
from anyexperts_jax.evaluate.results import RoutingSummary
from anyexperts_jax.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Records = Sequence[dict[str, Any]]  # of metrics.jsonl, see train.metrics
ROUTER_LOSSES = {"balance_loss": "Balance loss", "importance_loss": "Importance loss", "z_loss": "z loss"}


def draw_training(records: Records, path: Path) -> Path:
    """Loss, validation accuracy, real experts by modality and load over the steps; the router's losses in small
    panels."""
    train, validation = (_of_kind(records, kind) for kind in ("train", "validation"))
    logged = router_losses(train)
    with style.figure(8.0, 6.2 + 1.9 * bool(logged), path) as drawn:
        grid = drawn.add_gridspec(2 + bool(logged), 6, height_ratios=[1, 1, 0.6][: 2 + bool(logged)])
        loss, exact, real, share = (drawn.add_subplot(grid[i // 2, 3 * (i % 2) : 3 * (i % 2) + 3]) for i in range(4))
        _draw_losses(loss, train, validation)
        _draw_domains(exact, validation)
        _draw_real_over_steps(real, train)
        _draw_balance_over_steps(share, train)
        wide = 6 // max(len(logged), 1)
        small = [drawn.add_subplot(grid[2, wide * i : wide * (i + 1)]) for i in range(len(logged))]
        for axes, (name, values) in zip(small, logged.items(), strict=True):
            _draw_router_loss(axes, ROUTER_LOSSES[name], [record["step"] for record in train], values)
        for axes in (loss, exact, real, share, *small):
            axes.set_xlabel("step", labelpad=1)
            axes.grid(True)
            if axes is not loss:
                axes.sharex(loss)
    return path


def router_losses(train: Records) -> dict[str, list[float]]:
    """The router's losses over the records, unweighted. Losses that are missing or always 0 are left out."""
    found = {name: [_number(record.get(name)) for record in train] for name in ROUTER_LOSSES}
    return {name: values for name, values in found.items() if np.nan_to_num(values).any()}


def _of_kind(records: Records, kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _draw_losses(axes: "Axes", train: Records, validation: Records) -> None:
    steps = [record["step"] for record in train]
    axes.plot(steps, [_number(r["answer_loss"]) for r in train], color="#a9c8de", linewidth=1)
    axes.plot(steps, _smooth([_number(r["answer_loss"]) for r in train]), color=style.SERIES[0], label="training")
    places = [record["step"] for record in validation]
    losses = [_number(r["loss"]) for r in validation]
    axes.plot(places, losses, color=style.SERIES[1], marker="s", markersize=4, label="validation")
    axes.set_title("Nats per answer token")
    axes.set_ylim(0, None)
    _legend_below(axes)


def _draw_router_loss(axes: "Axes", title: str, steps: Sequence[int], values: Sequence[float]) -> None:
    axes.plot(steps, values, color="#a9c8de", linewidth=1)
    axes.plot(steps, _smooth(values), color=style.SERIES[0])
    axes.set_title(title)


def _smooth(values: Sequence[float]) -> Float[ndarray, " steps"]:
    """The mean over the records within 1/40 of the run to either side, ignoring undefined ones."""
    known = np.asarray(values, float)
    reach = len(known) // 40
    windows = [known[max(i - reach, 0) : i + reach + 1] for i in range(len(known))]
    return np.array([_nan_mean(window) for window in windows])


def _nan_mean(values: ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def _draw_domains(axes: "Axes", validation: Records) -> None:
    steps = [record["step"] for record in validation]
    for index, domain in enumerate(validation[0]["domains"] if validation else ()):
        colour, marker = style.series(index)
        right = [_number(r["domains"][domain]["exact_match"]) for r in validation]
        axes.plot(steps, right, color=colour, marker=marker, markersize=4, label=style.label(domain))
    axes.set_title("Answers right, teacher-forced")
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(_percent)
    if validation:
        _legend_below(axes)


def _draw_real_over_steps(axes: "Axes", train: Records) -> None:
    steps = [record["step"] for record in train]
    for index, name in enumerate(MODALITY_NAMES):
        means = [_nan_mean(np.array([_number(row[index]) for row in r["real_slots"]])) for r in train]
        if not np.isnan(means).all():
            axes.plot(steps, _smooth(means), color=style.series(index)[0], label=name)
    if train:
        axes.axhline(train[-1]["nominal_real_slots"], color=style.FAINT, linestyle="--", linewidth=1, label="nominal")
        _legend_below(axes)
    axes.set_title("Real experts per token, mean of layers")


def _draw_balance_over_steps(axes: "Axes", train: Records) -> None:
    steps = [record["step"] for record in train]
    worst = [_number(record["worst_load_max_over_mean"]) for record in train]
    axes.plot(steps, worst, color=style.SERIES[0], label="load max / mean, worst layer")
    axes.axhline(2, color=style.SERIES[0], linestyle="--", linewidth=1)
    axes.set_ylim(1, None)
    axes.set_title("Load and virtual share")
    axes.set_ylabel("slots of the busiest over mean")
    shares = axes.twinx()
    shares.plot(steps, [_number(r["mean_virtual_share"]) for r in train], color=style.SERIES[1], label="virtual share")
    shares.set_ylabel("virtual slots of all")
    shares.set_ylim(0, None)
    shares.yaxis.set_major_formatter(_percent)
    shares.spines["right"].set_visible(True)
    _legend_below(axes, [*axes.get_lines()[:1], *shares.get_lines()])


def _percent(value: float, place: float) -> str:
    return f"{100 * value:g}%"


def _legend_below(axes: "Axes", lines: "Sequence[Line2D] | None" = None) -> None:
    handles = axes.get_legend_handles_labels()[0] if lines is None else lines
    labels = [str(handle.get_label()) for handle in handles]
    below = (0.5, -0.2)
    axes.legend(handles, labels, ncols=3, columnspacing=1.2, handlelength=1.4, loc="upper center", bbox_to_anchor=below)


def draw_real_experts(summary: RoutingSummary, nominal: float, path: Path) -> Path:
    """Mean real experts per token by layer, with a line per modality and one for the nominal budget."""
    from matplotlib.ticker import MaxNLocator

    real_LM = np.asarray(summary.real_slots_LM, float)
    layers = np.arange(len(real_LM))
    with style.figure(8.0, 3.2, path) as drawn:
        axes = drawn.subplots()
        for m, name in enumerate(MODALITY_NAMES):
            if np.isnan(real_LM[:, m]).all():
                continue
            colour, marker = style.series(m)
            label = f"{name}, mean {summary.real_slots_by_modality[name]:.2f}"
            axes.plot(layers, real_LM[:, m], color=colour, marker=marker, linewidth=1.8, label=label)
        axes.axhline(nominal, color=style.INK, linestyle="--", linewidth=1, label=f"nominal {nominal:.2f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(-0.3, len(real_LM) - 0.7)
        axes.set_xlabel("MoE layer")
        axes.set_ylabel("real experts per token")
        axes.grid(True)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return path


def draw_load(summary: RoutingSummary, path: Path) -> Path:
    """Slots of each real expert relative to the layer's mean, for all tokens and for the tokens of each modality."""
    load_LME = np.asarray(summary.load_LME, float)
    panels = [("all tokens", load_LME.sum(axis=1))]
    panels += [(name, load_LME[:, m]) for m, name in enumerate(MODALITY_NAMES) if load_LME[:, m].sum() > 0]
    layers = load_LME.shape[0]
    with style.figure(8.0, 0.55 + len(panels) * (0.34 + 0.17 * max(layers, 2)), path, painting=True) as drawn:
        grid = drawn.subplots(len(panels), 1, sharex=True)
        for axes, (name, load_LE) in zip(np.atleast_1d(grid), panels, strict=True):
            relative = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
            picture = axes.imshow(relative, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
            axes.set_title(f"{name}: busiest expert {np.max(relative):.2f} times the mean")
            axes.set_yticks(range(layers) if layers <= 8 else [0, layers - 1])
            axes.set_ylabel("layer")
            axes.tick_params(axis="x", length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        np.atleast_1d(grid)[-1].set_xlabel("real expert")
        bar = drawn.colorbar(picture, ax=grid, fraction=0.025, pad=0.01, extend="max")
        bar.set_label("slots over mean")
    return path


def draw_separations(separations: Sequence[Separation], path: Path) -> Path:
    """The AUC of importance for each modality, with its interval, single layers and the untrained baselines."""
    with style.figure(8.0, 0.9 + 0.62 * len(separations), path) as drawn:
        axes = drawn.subplots()
        for row, one in enumerate(separations):
            span = [[one.auc - one.auc_low], [one.auc_high - one.auc]]
            first = row == 0
            label = "importance, mean of layers (95% interval)" if first else None
            axes.errorbar(one.auc, row, xerr=np.abs(span), fmt="o", color=style.SERIES[1], ms=8, capsize=3, label=label)
            rows = np.full(len(one.auc_by_layer), row + 0.2)
            axes.plot(one.auc_by_layer, rows, ".", color=style.SERIES[1], label="single layers" if first else None)
            for index, (name, auc) in enumerate(one.baselines.items()):
                colour, marker = ("#5d5d5d", "sDx"[index % 3])
                axes.plot(auc, row - 0.2, marker, color=colour, ms=5, label=name if first else None)
        axes.axvline(0.5, color=style.FAINT, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(separations)), [one.modality for one in separations])
        axes.set_ylim(len(separations) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("ROC AUC against the tokens that carry the answer; 0.5 is chance")
        axes.grid(True, axis="x")
        axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.47, 1.0), columnspacing=1.2, handletextpad=0.4)
    return path

"""Charts and table of `router_diagnostics`."""

from pathlib import Path

import numpy as np

from anyexperts_jax.core.modality import MODALITY_NAMES
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.evaluate.router_diagnostics import RouterDiagnostics
from anyexperts_jax.report import style
from anyexperts_jax.report.tables import figure_text

_MOST_EXPERTS, _MOST_LAYERS = 6, 4  # at most this many are shown


def draw_densities(found: RouterDiagnostics, path: Path) -> Path:
    """The density of router logits: a panel per expert and layer, a line per modality."""
    layers, _, experts, _ = found.density_LMEX.shape
    layers, experts = min(layers, _MOST_LAYERS), min(experts, _MOST_EXPERTS)
    middles_X = (found.edges_X[1:] + found.edges_X[:-1]) / 2
    with style.figure(1.6 + 1.5 * experts, 0.7 + 1.3 * layers, path) as drawn:
        grid = drawn.subplots(layers, experts, sharex=True, sharey=True, squeeze=False)
        for layer in range(layers):
            for expert in range(experts):
                axes = grid[layer, expert]
                for m, name in enumerate(MODALITY_NAMES):
                    density_X = found.density_LMEX[layer, m, expert]
                    if not np.isnan(density_X).any():
                        axes.plot(middles_X, density_X, color=style.SERIES[m], linewidth=1.4, label=name)
                axes.set_yticks([])
                if layer == 0:
                    axes.set_title(f"expert {expert + 1}")
                if expert == 0:
                    axes.set_ylabel(f"layer {layer}")
        drawn.supxlabel("router logit less its token's mean, nats", fontsize=9)
        drawn.supylabel("density, per nat", fontsize=9)
        drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return path


def draw_similarity(found: RouterDiagnostics, path: Path) -> Path:
    """The distances between the experts' weights, as a matrix."""
    experts = len(found.distance_EE)
    with style.figure(4.2, 3.4, path, painting=True) as drawn:
        axes = drawn.subplots()
        picture = axes.imshow(found.distance_EE, cmap="viridis", vmin=0, interpolation="nearest")
        if experts <= 8:
            labels = [str(expert + 1) for expert in range(experts)]
            for i in range(experts):
                for j in range(experts):
                    ink = "white" if found.distance_EE[i, j] < found.distance_EE.max() / 2 else "black"
                    axes.text(j, i, f"{found.distance_EE[i, j]:.2g}", ha="center", va="center", color=ink, fontsize=7)
            axes.set_xticks(range(experts), labels)
            axes.set_yticks(range(experts), labels)
        axes.set_xlabel("expert")
        axes.set_ylabel("expert")
        drawn.colorbar(picture, ax=axes).set_label("distance over expert 1's norm")
    return path


def draw_shares(found: RouterDiagnostics, path: Path) -> Path:
    """Each expert's share of a modality's real slots, with a panel per layer."""
    layers, _, experts = found.share_LME.shape
    layers = min(layers, _MOST_LAYERS)
    present = [m for m in range(len(MODALITY_NAMES)) if not np.isnan(found.share_LME[:, m]).any()]
    with style.figure(1.4 + 2.2 * layers, 2.6, path) as drawn:
        grid = drawn.subplots(1, layers, sharey=True, squeeze=False)[0]
        for layer, axes in enumerate(grid):
            start_M = np.zeros(len(present))
            for expert in range(experts):
                share_M = found.share_LME[layer, present, expert]
                colour = style.SERIES[expert % len(style.SERIES)]
                label = f"expert {expert + 1}" if experts <= 8 else None
                axes.bar(range(len(present)), share_M, bottom=start_M, color=colour, width=0.75, label=label)
                start_M += share_M
            axes.set_xticks(range(len(present)), [MODALITY_NAMES[m] for m in present])
            axes.set_title(f"layer {layer}")
        grid[0].set_ylabel("share of real slots")
        if experts <= 8:
            drawn.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper")
    return path


def diagnostics_table(found: RouterDiagnostics) -> TextTable:
    """The figures for expert uniformity and router rigidity."""
    experts = len(found.distance_EE)
    others = ~np.eye(experts, dtype=bool)
    rows = [
        ("loss, nats per answer token", figure_text(found.loss, ".3f")),
        ("loss with shuffled logits", figure_text(float(np.mean(found.shuffled_losses)), ".3f")),
        ("cost of shuffling", figure_text(found.shuffle_cost, "+.3f")),
    ]
    if experts > 1:
        rows += [
            ("least distance between two experts", f"{found.distance_EE[others].min():.1e}"),
            ("mean cosine between experts", figure_text(float(found.cosine_EE[others].mean()), ".4f")),
        ]
    for a, name in enumerate(MODALITY_NAMES):
        for b in range(a + 1, len(MODALITY_NAMES)):
            if not np.isnan(found.overlap_MM[a, b]):
                rows.append((f"overlap of {name} and {MODALITY_NAMES[b]}", figure_text(found.overlap_MM[a, b], ".2f")))
    return TextTable("Experts and router", ("what", "value"), tuple(rows))

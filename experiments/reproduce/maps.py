"""Draws Figures 4 and 5: importance maps of one kept checkpoint on each domain's first test questions."""

import pathlib
from collections.abc import Sequence

from anyexperts_jax.evaluate.trained import load_trained
from anyexperts_jax.report.example_map import map_examples
from anyexperts_jax.report.importance_maps import draw_importance_maps
from experiments.reproduce.experiment import Run
from experiments.reproduce.recipes import TRAIN_FOLDER, has_checkpoint

FIGURE4, FIGURE5 = ("general", "ocr", "nlp", "speech"), ("video",)  # domains
_EXAMPLES, _ANSWER_TOKENS = 3, 24


def draw_maps(
    run: Run, root: pathlib.Path, domains: Sequence[str], folder: pathlib.Path, stem: str
) -> list[pathlib.Path]:
    """Draws a picture per domain, `stem`_DOMAIN.png, from the run's checkpoint; none if it was not kept."""
    if not has_checkpoint(root / run.id):
        return []
    trained = load_trained(root / run.id / TRAIN_FOLDER, "last")
    return [
        draw_importance_maps(
            map_examples(trained, domain, _EXAMPLES, _EXAMPLES, _ANSWER_TOKENS), folder / f"{stem}_{domain}.png"
        )
        for domain in domains
        if domain in run.config.data.domains
    ]

"""Scores of tasks with the experts they used, their tables and files: the same for every harness."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.harness.score import Used
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.budget import mixes
from anyexperts_jax.routing.policies import IMPORTANCE
from anyexperts_jax.train.metrics import plain


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """The score of a task at a budget, and how many experts it used.

    Attributes:
      score: the harness's value of `metric`; `standard_error` is nan if it reports none.
      examples: how many were scored.
      budget: requested real experts per token; None: the model's own window.
      realised: real experts used per token, mean over MoE layers; nan for a dense model.
      by_layer: real experts used per token in each MoE layer.
      by_modality: the same for the tokens of each modality, by its name.
      policy: what decides how many experts a token gets.
      seconds: time of the whole task, compilation included.
    """

    task: str
    metric: str
    score: float
    standard_error: float
    higher_is_better: bool | None
    examples: int
    budget: float | None
    realised: float
    by_layer: tuple[float, ...]
    by_modality: Mapping[str, tuple[float, ...]]
    policy: str
    seconds: float


def scores_of(
    found: Mapping[str, Any], used: Used, config: ModelConfig, budget: float | None, seconds: float
) -> list[TaskScore]:
    """Returns the scores in what a harness's `simple_evaluate` returned.

    Args:
      used: the experts that its requests used.
      seconds: of the whole task, compilation included.
    """
    by_layer = used.by_layer
    return [
        TaskScore(
            name,
            metric,
            score,
            error,
            better,
            examples=_count_examples(found, name),
            budget=budget,
            realised=sum(by_layer) / len(by_layer) if by_layer else float("nan"),
            by_layer=by_layer,
            by_modality=used.by_modality,
            policy=policy_name(config, budget),
            seconds=seconds,
        )
        for name, metric, score, error, better in _metrics(found)
    ]


def score_table(scores: Sequence[TaskScore], title: str) -> TextTable:
    """Returns the table of scores that is printed."""
    columns = ("task", "metric", "budget", "score", "± error", "real experts", "examples", "seconds", "policy")
    rows = [
        (
            one.task,
            one.metric,
            _shown(one.budget),
            f"{one.score:.4f}",
            "-" if math.isnan(one.standard_error) else f"{one.standard_error:.4f}",
            "dense" if math.isnan(one.realised) else f"{one.realised:.2f}",
            str(one.examples),
            f"{one.seconds:.1f}",
            one.policy,
        )
        for one in scores
    ]
    return TextTable(title, columns, tuple(rows), names=2)


def layer_table(scores: Sequence[TaskScore]) -> TextTable | None:
    """Returns a table of real experts per token in each MoE layer; None for a dense model."""
    measured = {(one.task, one.budget): one for one in scores if one.by_layer}
    if not measured:
        return None
    layers = max(len(one.by_layer) for one in measured.values())
    rows = [
        (task, _shown(budget), *(f"{real:.2f}" for real in one.by_layer)) for (task, budget), one in measured.items()
    ]
    return TextTable(
        "real experts per token, by MoE layer", ("task", "budget", *map(str, range(layers))), tuple(rows), names=2
    )


def modality_table(scores: Sequence[TaskScore]) -> TextTable | None:
    """Returns a table of real experts per token by modality and MoE layer; None if all tokens were text, or no layer
    has experts.
    """
    measured = {(one.task, one.budget): one for one in scores if len(one.by_modality) > 1}
    if not measured:
        return None
    layers = max(len(real) for one in measured.values() for real in one.by_modality.values())
    rows = [
        (task, _shown(budget), name, f"{sum(real_L) / len(real_L):.2f}", *(f"{real:.2f}" for real in real_L))
        for (task, budget), one in measured.items()
        for name, real_L in one.by_modality.items()
    ]
    columns = ("task", "budget", "modality", "mean", *map(str, range(layers)))
    return TextTable("real experts per token, by modality and MoE layer", columns, tuple(rows), names=3)


def _shown(budget: float | None) -> str:
    return "own" if budget is None else f"{budget:g}"


def write_scores(scores: Sequence[TaskScore], path: pathlib.Path, command: str) -> None:
    """Writes the scores as JSON; nan becomes null."""
    rows = plain([dataclasses.asdict(one) for one in scores])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "scores": rows}, indent=2) + "\n", encoding="utf-8")


def policy_name(config: ModelConfig, budget: float | None) -> str:
    """Names, for a table, what decides how many experts a token gets."""
    if config.stack.num_moe_layers == 0:
        return "dense"
    if not mixes(config) or config.moe.policy != IMPORTANCE:
        return config.moe.policy
    return "static" if budget is None or budget == round(budget) else "static, mixed by position"


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float, bool | None]]:
    """Yields (task, metric, score, standard error, whether higher is better) from a harness's results."""
    for name, values in {**found["results"], **found.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            error = float(error) if isinstance(error, int | float) else float("nan")
            shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
            yield name, shown, float(value), error, found["higher_is_better"].get(name, {}).get(metric)


def _count_examples(found: Mapping[str, Any], name: str) -> int:
    counts = found.get("n-samples", {})
    if name in counts:
        return int(counts[name]["effective"])
    subtasks = found.get("group_subtasks", {}).get(name, [])
    return sum(int(counts[one]["effective"]) for one in subtasks if one in counts)

"""The first screen of the page: the run's results in a few figures, and a bar for each domain's score."""

import dataclasses
import math
from typing import Any

from anyexperts_jax.data.scores import metric_label
from anyexperts_jax.evaluate.results import EvaluationResult
from anyexperts_jax.report.source import ReportSource
from anyexperts_jax.report.tables import examples_text, figure_text
from anyexperts_jax.report.verdicts import usual_budget, verdicts


@dataclasses.dataclass(frozen=True)
class Tile:
    """One figure, its label, and what to compare it with."""

    label: str
    value: str
    about: str = ""


@dataclasses.dataclass(frozen=True)
class ScoreBar:
    """A domain's score in [0, 1], and that of the best constant answers if it is known."""

    domain: str
    score: float
    chance: float | None = None


@dataclasses.dataclass(frozen=True)
class Overview:
    """The content of the first screen. `missing` names the commands that would add more."""

    tiles: tuple[Tile, ...] = ()
    caption: str = ""
    scores: tuple[ScoreBar, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def has_chance(self) -> bool:
        return all(one.chance is not None for one in self.scores)


def overview(source: ReportSource) -> Overview:
    """Returns the evaluation's results at the budget nearest to that of training, or without one those of the log."""
    if source.evaluation is None:
        return _of_records(source)
    return _of_evaluation(source, source.evaluation)


def _of_evaluation(source: ReportSource, result: EvaluationResult) -> Overview:
    moe = source.config.model.moe
    usual, found = usual_budget(result, moe), verdicts(result, moe)
    tiles = [
        Tile("Learns to allocate", f"{sum(one.met for one in found)} of {len(found)}", "checks met, listed below"),
        Tile("Real experts per token", f"{usual.realised:.2f}", f"asked for {usual.budget:g}, {_range(result)}"),
    ]
    if result.separations:
        best = max(result.separations, key=lambda one: one.auc if not math.isnan(one.auc) else -1.0)
        others = "0.5 is chance" if len(result.separations) == 1 else "best of the modalities; 0.5 is chance"
        tiles.append(
            Tile("Importance finds the answer", f"AUC {figure_text(best.auc)}", f"on {best.modality}, {others}")
        )
    cheapest = min(result.budgets, key=lambda one: one.budget)
    if cheapest is not usual and usual.time.forward > 0:
        ratio = cheapest.time.forward / usual.time.forward
        about = f"of the forward time at {usual.budget:g}, on {result.device}"
        tiles.append(Tile(f"Budget {cheapest.budget:g} takes", f"{ratio:.0%}", about))
    metrics = " / ".join(dict.fromkeys(metric_label(score.metric) for score in usual.scores))
    caption = (
        f"Score ({metrics}) at budget {usual.budget:g}, on {examples_text(result)}; the mark is chance, the best "
        "constant answer."
    )
    scores = tuple(ScoreBar(one.domain, _share(one.score), _share(one.chance)) for one in usual.scores)
    return Overview(tuple(tiles), caption, scores)


def _range(result: EvaluationResult) -> str:
    budgets = sorted(one.budget for one in result.budgets)
    return f"runs at {budgets[0]:g} to {budgets[-1]:g}" if len(budgets) > 1 else "the one budget measured"


def _of_records(source: ReportSource) -> Overview:
    missing = (f"Not evaluated yet: run `anyexperts evaluate {source.root}` and then the report again.",)
    train, validation = (_last(source.records, kind) for kind in ("train", "validation"))
    tiles = []
    if train is not None:
        loss = _number(train["answer_loss"])
        about = f"training, step {train['step']} of {source.config.train.steps}"
        tiles.append(Tile("Nats per answer token", figure_text(loss), about))
    if validation is not None:
        about = f"validation, step {validation['step']}"
        tiles.append(Tile("Nats per answer token", figure_text(_number(validation["loss"])), about))
    if validation is None:
        return Overview(tuple(tiles), missing=missing)
    found = {name: _number(one["exact_match"]) for name, one in validation["domains"].items()}
    scores = tuple(ScoreBar(name, _share(score)) for name, score in found.items() if not math.isnan(score))
    caption = f"Validation answers right, teacher-forced, at step {validation['step']}."
    return Overview(tuple(tiles), caption, scores, missing)


def _last(records: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((record for record in reversed(records) if record["kind"] == kind), None)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _share(value: float) -> float:
    return 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0)

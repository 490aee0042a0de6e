"""The results of an evaluation, as dataclasses, JSON and CSV."""

import csv
import dataclasses
import json
import pathlib
from typing import Any, TypeVar

import dacite

from anyexperts_jax.core.errors import UserError, one_line
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.core.modality import MODALITY_NAMES, NUM_MODALITIES
from anyexperts_jax.evaluate.importance import Separation
from anyexperts_jax.train.metrics import plain
from anyexperts_jax.train.run_dir import write_whole

JSON_NAME = "evaluation.json"
CSV_NAME = "evaluation.csv"
_NAN = float("nan")
_BY_LAYER = ("real_slots_by_layer", "real_slots_LM", "virtual_share_LM", "load_LME", "load_max_over_mean")
_BY_MODALITY = ("real_slots_LM", "importance_LM", "virtual_share_LM", "load_LME")

Saved = TypeVar("Saved")


@dataclasses.dataclass(frozen=True)
class GroupScore:
    """The score of one question type or level."""

    examples: int
    score: float
    chance: float


@dataclasses.dataclass(frozen=True)
class DomainScore:
    """The scores of greedy answers to one domain's questions, in [0, 1]; higher is better.

    `chance` is the score of the best constant answer to each question type on the same examples. The last three fields
    score the correct answers, each token predicted from the correct ones before it. They are NaN in files of versions
    that did not measure them.
    """

    domain: str
    metric: str  # a name in METRICS; the score of wer is 1 - min(wer, 1), that of cer alike
    examples: int
    score: float
    standard_error: float
    chance: float
    exact_match: float
    wer: float | None  # word errors over words, lower is better; only for the metric "wer"
    by_question: dict[str, GroupScore]
    by_level: dict[str, GroupScore]
    # Each example's score, in the test split's order, so that budgets can be compared question by question. Empty in
    # files of versions that did not keep them.
    example_scores: tuple[float, ...] = ()
    error_rate: float | None = None  # over all answers together, lower is better; only for metrics that have one
    loss: float = _NAN  # nats per answer token, as in training
    bits_per_byte: float = _NAN  # of the answers' text
    token_accuracy: float = _NAN


@dataclasses.dataclass(frozen=True)
class RoutingSummary:
    """The routing of teacher-forced sequences. Averages are over valid tokens and MoE layers.

    Nested tuples are [layer][modality], NaN where there is no such token; load is [layer][modality][expert], in slots.
    """

    window: tuple[float, float]
    tokens: int
    real_slots: float
    real_slots_by_domain: dict[str, float]
    real_slots_by_modality: dict[str, float]
    real_slots_by_layer: tuple[float, ...]
    real_slots_LM: tuple[tuple[float, ...], ...]
    importance_LM: tuple[tuple[float, ...], ...]
    virtual_share_LM: tuple[tuple[float, ...], ...]
    virtual_share: float
    largest_virtual_share: float  # of any single token in any layer
    load_LME: tuple[tuple[tuple[int, ...], ...], ...]
    load_max_over_mean: tuple[float, ...]  # busiest real expert over the mean, by layer
    dropped: int  # real slots that overflowed their buffer; generation drops none: see `models.generate`


@dataclasses.dataclass(frozen=True)
class BudgetTime:
    """Medians of interleaved runs, as ratios to the budget marked as the reference."""

    reference: float  # the budget whose time is 1
    forward: float  # the whole model
    layer: float  # dispatch, experts and combine of one MoE layer, on this budget's own routing
    forward_seconds: float
    layer_seconds: float


@dataclasses.dataclass(frozen=True)
class BudgetResult:
    """One checkpoint at one budget."""

    budget: float  # as requested: real experts per token
    nominal: float  # (1 - rho_max) times the window's middle
    realised_validation: float  # real experts per token on the examples that the window was calibrated on
    routing: RoutingSummary  # on the test split; its real_slots is the realised budget
    scores: tuple[DomainScore, ...]
    time: BudgetTime

    @property
    def realised(self) -> float:
        return self.routing.real_slots

    @property
    def budget_error(self) -> float:
        """Relative distance of the realised average from the requested one."""
        return abs(self.realised - self.budget) / self.budget


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """One checkpoint at several budgets, and its routing and importance at the window it was trained with."""

    step: int
    examples_per_domain: int  # of the test split; a domain with fewer records its own number in its score
    device: str
    versions: dict[str, str]
    trained: RoutingSummary
    separations: tuple[Separation, ...]  # empty for static top-k, which has no importance
    budgets: tuple[BudgetResult, ...]


def save_evaluation(result: EvaluationResult, run_dir: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes evaluation.json and evaluation.csv (one row per budget and domain) into the run's directory."""
    json_path, csv_path = run_dir / JSON_NAME, run_dir / CSV_NAME
    write_whole(json_path, json.dumps(plain(dataclasses.asdict(result)), indent=1) + "\n")
    rows = [_csv_row(budget, score) for budget in result.budgets for score in budget.scores]
    with open(csv_path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return json_path, csv_path


def load_evaluation(run_dir: pathlib.Path) -> EvaluationResult | None:
    """Loads the saved evaluation of a run; None if there is none.

    Raises:
      UserError: if this version cannot have written the file.
    """
    path = run_dir / JSON_NAME
    if not path.exists():
        return None
    complaint, advice = f"{path} is not an evaluation", "run evaluate again"
    result = read_saved(EvaluationResult, read_text(path, "evaluation"), complaint, advice)
    _require_consistent(result, complaint, advice)
    return result


def _require_consistent(result: EvaluationResult, complaint: str, advice: str) -> None:
    """Checks that the parts of an evaluation agree, as in every file that `evaluate` writes.

    Raises:
      UserError: naming the part that does not.
    """
    summaries = {"trained": result.trained} | {f"budget {one.budget:g}": one.routing for one in result.budgets}
    layers = len(result.trained.real_slots_by_layer)
    faults = [] if result.budgets else ["it has no budgets"]
    for name, summary in summaries.items():
        by_layer = {field: getattr(summary, field) for field in _BY_LAYER}
        faults += [
            f"{name}: {field} is not of {layers} layers" for field, rows in by_layer.items() if len(rows) != layers
        ]
        by_modality = {field: getattr(summary, field) for field in _BY_MODALITY}
        faults += [
            f"{name}: {field} is not of {NUM_MODALITIES} modalities"
            for field, rows in by_modality.items()
            if any(len(row) != NUM_MODALITIES for row in rows)
        ]
        if len(summary.importance_LM) not in (0, layers):
            faults.append(f"{name}: importance_LM is not of {layers} layers")
    for one in result.budgets:
        names = [score.domain for score in one.scores]
        if not names or names != [score.domain for score in result.budgets[0].scores]:
            faults.append(f"budget {one.budget:g}: its domains are not those of the first")
        faults += [
            f"budget {one.budget:g}: no routing of {n}" for n in names if n not in one.routing.real_slots_by_domain
        ]
    faults += [
        f"separation of {one.modality!r} is not of {layers} layers"
        for one in result.separations
        if len(one.auc_by_layer) != layers or one.modality not in MODALITY_NAMES
    ]
    if faults:
        raise UserError(f"{complaint} of this version ({faults[0]}); {advice}")


def read_saved(cls: type[Saved], text: str, complaint: str, advice: str) -> Saved:
    """Reads a dataclass from JSON, strictly.

    Raises:
      UserError: if this version would not write the text; the message is `complaint`, the reason and `advice`.
    """
    try:
        config = dacite.Config(cast=[tuple], type_hooks={float: _read_float}, strict=True)
        return dacite.from_dict(cls, parse_json_object(text, "the text"), config)
    except (dacite.DaciteError, TypeError, ValueError, AttributeError) as error:  # also from dacite's casts
        line = one_line(error, 200)
        raise UserError(f"{complaint} of this version ({line}); {advice}") from error


def _read_float(value: Any) -> Any:
    """Reads null as NaN, since JSON has no NaN. Dacite refuses any other value that is not a number."""
    if value is None:
        return _NAN
    return float(value) if type(value) in (int, float) else value


def _csv_row(budget: BudgetResult, score: DomainScore) -> dict[str, Any]:
    k_min, k_max = budget.routing.window
    return {
        "budget": budget.budget,
        "k_min": round(k_min, 4),
        "k_max": round(k_max, 4),
        "nominal": round(budget.nominal, 4),
        "realised": round(budget.realised, 4),
        "domain": score.domain,
        "realised_in_domain": round(budget.routing.real_slots_by_domain[score.domain], 4),
        "metric": score.metric,
        "score": round(score.score, 4),
        "standard_error": round(score.standard_error, 4),
        "chance": round(score.chance, 4),
        "exact_match": round(score.exact_match, 4),
        "wer": "" if score.wer is None else round(score.wer, 4),
        "error_rate": "" if score.error_rate is None else round(score.error_rate, 4),
        "loss": round(score.loss, 4),
        "bits_per_byte": round(score.bits_per_byte, 4),
        "token_accuracy": round(score.token_accuracy, 4),
        "examples": score.examples,
        "virtual_share": round(budget.routing.virtual_share, 4),
        "load_max_over_mean": round(max(budget.routing.load_max_over_mean), 4),
        "dropped": budget.routing.dropped,
        "forward_time_ratio": round(budget.time.forward, 4),
        "layer_time_ratio": round(budget.time.layer, 4),
    }

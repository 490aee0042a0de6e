"""`RunResult`: the results kept of a run, small enough to commit, and their JSON."""

import dataclasses
import json
import pathlib
from typing import Any

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.domain import SPLITS_VERSION
from anyexperts_jax.evaluate.importance import Separation
from anyexperts_jax.evaluate.results import BudgetResult, DomainScore, EvaluationResult, read_saved
from anyexperts_jax.train.metrics import plain
from anyexperts_jax.train.run_dir import write_whole

RESULT_NAME = "result.json"
_DIGITS = 6  # significant


@dataclasses.dataclass(frozen=True)
class BudgetScores:
    """One checkpoint at one budget: scores, and the distribution of real experts (units: `evaluate.results`)."""

    budget: float  # nominal
    nominal: float
    realised: float
    window: tuple[float, float]
    real_slots_by_domain: dict[str, float]
    real_slots_by_modality: dict[str, float]
    virtual_share: float
    load_max_over_mean: tuple[float, ...]
    dropped: int
    scores: tuple[DomainScore, ...]

    @classmethod
    def of(cls, result: BudgetResult) -> "BudgetScores":
        routing = result.routing
        return cls(
            budget=result.budget,
            nominal=result.nominal,
            realised=result.realised,
            window=routing.window,
            real_slots_by_domain=routing.real_slots_by_domain,
            real_slots_by_modality=routing.real_slots_by_modality,
            virtual_share=routing.virtual_share,
            load_max_over_mean=routing.load_max_over_mean,
            dropped=routing.dropped,
            scores=result.scores,
        )

    def score(self, domain: str) -> DomainScore:
        return next(score for score in self.scores if score.domain == domain)


@dataclasses.dataclass(frozen=True)
class ExpertFigures:
    """EvoMoE's diagnostics of a mixture, on validation examples; losses in nats per answer token, E experts.

    Distances are between weights of all layers, over the norm of expert 1's.
    """

    loss: float
    shuffled_loss: float  # with each token's router logits permuted among experts, mean of the shuffles
    alone: tuple[float, ...]  # loss of each expert in place of all
    distance: dict[str, tuple[float, ...]]  # by stage, at its end: experts 2 to E from expert 1
    drift: dict[str, float]  # by stage, at its end: expert 1 from the dense FFN it was made from
    overlap: dict[str, float]  # by pair of modalities, "text-image": of their router logits' densities; 1 is alike
    share: dict[str, tuple[float, ...]]  # by modality: the share of its real slots that each expert got, mean of layers


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a finished run."""

    id: str
    name: str
    seed: int
    trained_budget: float  # nominal
    step: int  # of the checkpoint measured
    validation: dict[str, float]  # share of right teacher-forced answers by domain, at the last step
    budgets: tuple[BudgetScores, ...]
    separations: tuple[Separation, ...]  # importance against the answers' tokens, at the trained window
    train_seconds: float
    evaluate_seconds: float
    device: str
    versions: dict[str, str]
    experts: ExpertFigures | None = None  # only of runs that evolve or upcycle experts
    splits: int | None = None  # data.domain.SPLITS_VERSION of its questions; None in older results, which lack it
    origin: str | None = (
        None  # the shared training it started from, "NAME:DIGEST"; None without one, or in older results
    )

    @classmethod
    def of(cls, evaluation: EvaluationResult, **fields: Any) -> "RunResult":
        return cls(
            splits=SPLITS_VERSION,
            step=evaluation.step,
            budgets=tuple(BudgetScores.of(one) for one in evaluation.budgets),
            separations=evaluation.separations,
            device=evaluation.device,
            versions=evaluation.versions,
            **fields,
        )

    @property
    def own(self) -> BudgetScores:
        """Returns the scores at the trained budget.

        Raises:
          UserError: if the run was not evaluated there.
        """
        return self.at(self.trained_budget)

    def at(self, budget: float) -> BudgetScores:
        """Returns the scores at a nominal budget.

        Raises:
          UserError: if the run was not evaluated there.
        """
        for one in self.budgets:
            if abs(one.budget - budget) < 1e-6:
                return one
        raise UserError(f"run {self.id} ({self.name}) was not evaluated at budget {budget:g}")


def save_result(result: RunResult, folder: pathlib.Path) -> pathlib.Path:
    """Writes result.json atomically."""
    path = folder / RESULT_NAME
    write_whole(path, json.dumps(result_to_json(result)) + "\n")
    return path


def load_result(path: pathlib.Path) -> RunResult:
    """Raises:
    UserError: when the file is not one this version wrote.
    """
    return result_from_json(path.read_text(), str(path))


def result_to_json(result: RunResult) -> Any:
    """Returns plain values rounded to six significant digits, with None for NaN."""
    return plain(_rounded(dataclasses.asdict(result)))


def result_from_json(text: str, name: str) -> RunResult:
    """Inverts `result_to_json` and `json.dumps`; `name` is for messages."""
    return read_saved(RunResult, text, f"{name} is not a run's result", "remove it to run it again")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value

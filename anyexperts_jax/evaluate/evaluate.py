"""`evaluate` measures one checkpoint at several budgets: scores and chance, realised real experts, load and time."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError, require, require_one_of
from anyexperts_jax.core.registries import METRICS
from anyexperts_jax.core.versions import device_text, versions
from anyexperts_jax.data.config import named_metrics
from anyexperts_jax.data.mixture import with_places
from anyexperts_jax.data.pipeline import eval_batches
from anyexperts_jax.dispatch.execution import require_capacity_for
from anyexperts_jax.evaluate.likelihood import Likelihood, choose, likelihood_of, token_accuracies
from anyexperts_jax.evaluate.measure import (
    Batches,
    RoutingSample,
    Window,
    mean_real_slots,
    measure_separations,
    sample_routing,
    summarise,
)
from anyexperts_jax.evaluate.model_scores import model_scores
from anyexperts_jax.evaluate.results import BudgetResult, BudgetTime, DomainScore, EvaluationResult, save_evaluation
from anyexperts_jax.evaluate.scoring import longest_answer, predict, score_domain
from anyexperts_jax.evaluate.timing import time_budgets
from anyexperts_jax.evaluate.trained import Trained, load_trained, own_window, require_experts, with_room
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import ModelOutput
from anyexperts_jax.routing.budget import calibrate_budget, nearest_budget, shift_budget
from anyexperts_jax.train.fit import require_room_for_examples
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.run_lock import run_lock

BUDGET_RATIOS = (0.6, 0.8, 1.0, 1.2)  # relative to the nominal budget of training: 4.8 6.4 8.0 9.6 for 8..12


@dataclasses.dataclass(frozen=True)
class Options:
    """How much to measure.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    num_examples: int = 64  # of each domain's test split, or all of a smaller split
    calibration_examples: int = 32  # of each domain's validation split, or all of a smaller split
    batch_size: int = 64  # largest batch
    tolerance: float = 0.01  # relative error allowed in the realised budget on the calibration examples
    time_rounds: int = 9  # interleaved timing rounds, whose medians are reported
    calibrated: bool = True  # False: use the window of the nominal budget, whatever it realises
    metrics: tuple[str, ...] = ()  # "NAME=METRIC": scores the domain NAME by METRIC, not by the run's own choice
    model_baselines: bool = False  # also compare importance with scores from router, gradients and embeddings (slower)

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("num_examples", "calibration_examples", "batch_size", "time_rounds"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be >= 1")
        require(0 < self.tolerance < 1, f"tolerance={self.tolerance} must be in (0, 1)")

    @property
    def rows(self) -> int:
        """Rows of every batch. All batches share one shape, so each function compiles once."""
        return min(self.batch_size, max(self.num_examples, self.calibration_examples))


def evaluate(
    run_dir: str | pathlib.Path,
    budgets: Sequence[float] | None = None,
    domains: Sequence[str] | None = None,
    *,
    which: str = "best",
    mesh: Mesh | None = None,
    data: Mapping[str, str] | None = None,
    options: Options = Options(),
    note: Callable[[str], None] = lambda line: None,
    show: Callable[[EvaluationResult], None] = lambda result: None,
) -> EvaluationResult:
    """Evaluates a run's checkpoint at each budget and writes evaluation.json and evaluation.csv into its directory.

    Scores are of generated answers, for which no slot is dropped (`generate`). Realised budget, load and `dropped` come
    from a teacher-forced pass over the same test sequences with the run's own dispatch.

    Args:
      budgets: real experts per token, on average; None: `default_budgets`.
      domains: names from the run's mixture; None: all.
      mesh: may have any shape, whatever the run was trained on; None: the first device.
      data: paths or addresses by name: further data, or the new place of data that the run was trained on. Unless
        `domains` is given, these are the domains that are measured.
      note: called with a line when each part is done.
      show: called with the result before it is written, so that a failed write does not lose it.

    Raises:
      UserError: if there is no such run or checkpoint, a domain is unknown, a budget is out of reach, the examples do
        not fit into memory, the directory is not writable, or another process is evaluating the same run.
      OSError: if there is no disk space for the result.
    """
    root = RunDir(pathlib.Path(run_dir)).root
    require(root.is_dir(), f"no run in {root}: there is no such folder")
    with run_lock(root, "evaluate"):
        trained = load_trained(root, which, mesh)
        if data:
            own = with_places(trained.config.data, data)
            trained = dataclasses.replace(trained, config=dataclasses.replace(trained.config, data=own))
            domains = tuple(domains or data)
            for name in data:
                note(trained.sources.describe(name))
        result = evaluate_trained(trained, budgets, domains, options=options, note=note)
        show(result)
        save_evaluation(result, root)
    return result


def default_budgets(moe: AnyExpertsConfig) -> tuple[float, ...]:
    """Returns 0.6, 0.8, 1 and 1.2 times the nominal budget, like the paper's 4.8 to 9.6.

    Each is moved to the nearest budget that a window of the run's width can realise: whole numbers for static top-k,
    and never fewer than k_min = 1 slots. Duplicates are removed.
    """
    found = (nearest_budget(moe, round(ratio * moe.expected_real_slots, 6)) for ratio in BUDGET_RATIOS)
    return tuple(dict.fromkeys(found))


def _note_moved_budgets(moe: AnyExpertsConfig, budgets: Sequence[float], note: Callable[[str], None]) -> None:
    wanted = [round(ratio * moe.expected_real_slots, 6) for ratio in BUDGET_RATIOS]
    if list(budgets) != wanted:
        metric_of, taken = (", ".join(f"{budget:g}" for budget in each) for each in (wanted, budgets))
        k_min, k_max = own_window(moe)
        width = f"windows as wide as the run's, {k_min:g} to {k_max:g}, do not have all of {metric_of}"
        note(f"budgets {taken}: {width}; these are the nearest they have")


def evaluate_trained(
    trained: Trained,
    budgets: Sequence[float] | None = None,
    domains: Sequence[str] | None = None,
    *,
    options: Options = Options(),
    note: Callable[[str], None] = lambda line: None,
) -> EvaluationResult:
    """Like `evaluate`, without reading or writing files of the run."""
    require_experts(trained.config, "nothing to evaluate at a budget")
    moe = trained.config.model.moe
    if budgets:
        budgets = tuple(dict.fromkeys(budgets))
    else:
        budgets = default_budgets(moe)
        _note_moved_budgets(moe, budgets, note)
    names = tuple(domains or trained.config.data.domains)
    for name in names:
        require_one_of("domain", name, trained.config.data.domains)
    data = trained.config.data
    metrics = data.metric_names() | named_metrics(options.metrics, "--metric", names)
    for budget in budgets:
        # Before anything is measured, refuse a budget that is out of reach or that the buffers cannot serve.
        require_capacity_for(shift_budget(moe, budget), trained.config.model.stack.execution)
    amounts = f"{options.num_examples} and {options.calibration_examples} examples of {len(names)} domains"
    every = (options.num_examples + options.calibration_examples) * len(names)
    require_room_for_examples(trained.config.data.encoding, every, amounts)
    validation = load_batches(trained, names, "validation", options.calibration_examples, options.rows)
    test = load_batches(trained, names, "test", options.num_examples, options.rows)
    note(f"{options.num_examples} test and {options.calibration_examples} validation examples of {', '.join(names)}")
    _note_missing_examples(trained, names, options, note)
    model = with_room(trained.config.model, max(_most_slots(moe, budget) for budget in budgets))
    calibrated = []
    for budget in budgets:
        calibrated.append(_calibrated(trained, model, validation, budget, options=options, note=note))
        window, realised = calibrated[-1].window, calibrated[-1].realised
        note(f"budget {budget:g}: window {_text(window)} realises {realised:.3f} on validation")
    mixed = _mixed_batch(test, trained.whole_rows(options.rows))
    times = time_budgets(trained, model, mixed, {one.budget: one.window for one in calibrated}, options.time_rounds)
    found = []
    for one in calibrated:
        scored = _score_domains(trained, model, test, one.window, metrics)
        found.append(_at_budget(trained, one, scored, times[one.budget]))
        note(f"budget {one.budget:g}: {_score_line(found[-1])}")
    own = own_window(moe)
    sample = sample_routing(trained, with_room(model, own[1]), test, own)
    wanted = options.model_baselines and moe.uses_importance
    more = model_scores(trained, model, sample, test, own) if wanted else {}
    return EvaluationResult(
        step=trained.step,
        examples_per_domain=max(score.examples for score in found[0].scores),
        device=device_text(),
        versions=versions(),
        trained=summarise(sample, moe, own),
        separations=measure_separations(sample, test, moe, more),
        budgets=tuple(found),
    )


def load_batches(trained: Trained, domains: Sequence[str], split: str, examples: int, rows: int) -> Batches:
    """Loads the first `examples` of each domain's split, or all if it has fewer, in batches of `trained.whole_rows`."""
    data, sources, size = trained.config.data, trained.sources, trained.whole_rows(rows)
    counts = {name: sources.count(name, split, examples) for name in domains}
    return {name: tuple(eval_batches(data, name, split, size, counts[name], sources=sources)) for name in domains}


def _note_missing_examples(
    trained: Trained, names: Sequence[str], options: Options, note: Callable[[str], None]
) -> None:
    for split, wanted in (("test", options.num_examples), ("validation", options.calibration_examples)):
        for name in names:
            count = trained.sources.count(name, split, wanted)
            if count < wanted:
                note(f"{name} has {count} {split} examples, fewer than {wanted}: all of them are taken")


@dataclasses.dataclass(frozen=True)
class _Calibrated:
    """A budget, the window found for it, and the average that this window realises on the validation examples."""

    budget: float
    window: Window
    realised: float


def _calibrated(
    trained: Trained,
    model: ModelConfig,
    batches: Batches,
    budget: float,
    *,
    options: Options,
    note: Callable[[str], None],
) -> _Calibrated:
    if options.calibrated:
        window, realised = calibrate(trained, model, batches, budget, tolerance=options.tolerance, note=note)
    else:
        window = own_window(shift_budget(trained.config.model.moe, budget))
        realised = mean_real_slots(trained, model, batches, window)
    return _Calibrated(budget, window, realised)


def calibrate(
    trained: Trained,
    model: ModelConfig,
    batches: Batches,
    budget: float,
    *,
    tolerance: float = 0.01,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[Window, float]:
    """Finds the window, as wide as the run's, that realises `budget` on `batches`; returns it and its realised budget.

    If tokens hardly differ in importance, the realised average jumps by whole slots. If no window comes within
    `tolerance`, the nearest one is returned and `note` is called. `model` is the run's; it gets wider slot arrays if a
    window needs them.
    """
    seen: dict[Window, float] = {}

    def measure(moe: AnyExpertsConfig) -> float:
        window = own_window(moe)
        seen[window] = mean_real_slots(trained, with_room(model, moe.k_max), batches, window)
        return seen[window]

    try:
        window = own_window(calibrate_budget(trained.config.model.moe, measure, budget, tolerance=tolerance))
    except UserError as error:
        if not seen:
            raise
        window = min(seen, key=lambda one: abs(seen[one] - budget))
        note(f"budget {budget:g}: {error}; going on with {_text(window)}")
    return window, seen[window]


def _most_slots(moe: AnyExpertsConfig, budget: float) -> float:
    """Returns an upper bound for the k_max of a budget: with this k_min, real slots alone already reach the budget."""
    return min(budget / (1 - moe.rho_max) + 1, moe.num_columns) + moe.k_max - moe.k_min


def _score_domains(
    trained: Trained, model: ModelConfig, test: Batches, window: Window, metrics: Mapping[str, str]
) -> tuple[RoutingSample, tuple[DomainScore, ...]]:
    """Returns the routing at a window, and the scores of every domain."""
    likelihoods = dict.fromkeys(test, Likelihood())
    accuracies: dict[str, list[float]] = {name: [] for name in test}

    def see(name: str, batch: Batch, output: ModelOutput) -> None:
        likelihoods[name] += likelihood_of(output, batch, trained.tokenizer)
        accuracies[name] += token_accuracies(output, batch)

    sample = sample_routing(trained, model, test, window, see)
    sources = {name: trained.sources.open(name, "test") for name in test}
    metric_of = {name: metrics.get(name, source.metric) for name, source in sources.items()}
    answered = [batches for name, batches in test.items() if not METRICS[metric_of[name]].by_tokens]
    length = max((longest_answer(batches) for batches in answered), default=0)
    scores = []
    for name, batches in test.items():
        source, metric = sources[name], metric_of[name]
        if METRICS[metric].by_tokens:
            answers = ["" for batch in batches for _ in batch.tokens_BT]
        elif METRICS[metric].by_likelihood:
            answers = choose(trained, model, source, batches, window)
        else:
            answers = [text for batch in batches for text in predict(trained, model, batch, window, length)]
        how: dict[str, Any] = {"metric": metric, "tokenizer": trained.tokenizer, "likelihood": likelihoods[name]}
        how["row_scores"] = accuracies[name] if METRICS[metric].by_tokens else None
        scores.append(score_domain(name, source, batches, answers, **how))
    return sample, tuple(scores)


def _at_budget(
    trained: Trained,
    calibrated: _Calibrated,
    scored: tuple[RoutingSample, tuple[DomainScore, ...]],
    time: BudgetTime,
) -> BudgetResult:
    moe, window = trained.config.model.moe, calibrated.window
    sample, scores = scored
    return BudgetResult(
        budget=float(calibrated.budget),
        nominal=(1 - moe.rho_max) * sum(window) / 2,
        realised_validation=calibrated.realised,
        routing=summarise(sample, moe, window),
        scores=scores,
        time=time,
    )


def _mixed_batch(test: Batches, rows: int) -> Batch:
    """Takes `rows` rows from the domains in turn, since budgets are averaged over the mixture and times must be too."""
    firsts = [batches[0] for batches in test.values()]
    dealt = [(row, i) for row in range(rows) for i in range(len(firsts))][:rows]
    return jax.tree.map(lambda *leaves: np.stack([leaves[i][row] for row, i in dealt]), *firsts)


def _text(window: Window) -> str:
    return f"[{window[0]:.2f}, {window[1]:.2f}]"


def _score_line(result: BudgetResult) -> str:
    scores = "  ".join(f"{score.domain} {score.score:.1%}" for score in result.scores)
    return f"realised {result.realised:.2f} on test; {scores}"

"""The input of a report: the files of a run, and measurements of its model."""

import dataclasses
import pathlib
from typing import Any

from jax.sharding import Mesh

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.core.quantities import count_text
from anyexperts_jax.evaluate.evaluate import load_batches
from anyexperts_jax.evaluate.importance import Separation
from anyexperts_jax.evaluate.measure import measure_separations, sample_routing, summarise
from anyexperts_jax.evaluate.results import EvaluationResult, RoutingSummary, load_evaluation
from anyexperts_jax.evaluate.router_diagnostics import RouterDiagnostics, diagnose
from anyexperts_jax.evaluate.trained import Trained, load_trained, own_window, require_experts
from anyexperts_jax.models.init import parameter_count
from anyexperts_jax.report.followed import FollowedItem, follow
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.bytes import BYTES
from anyexperts_jax.train.config import RunConfig, load_config
from anyexperts_jax.train.log_shape import require_complete
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.run_log import read_records

ROUTING_EXAMPLES = 16  # examples per domain, if no evaluation has measured more
_ANSWER_TOKENS = 24  # the most tokens of the model's answer to a question that is followed


@dataclasses.dataclass(frozen=True, eq=False)
class ReportSource:
    """The input of a report. None or empty: the run does not have it."""

    root: pathlib.Path
    config: RunConfig
    records: list[dict[str, Any]]
    evaluation: EvaluationResult | None
    step: int | None  # of the checkpoint
    no_checkpoint: str  # why there is no checkpoint
    routing: RoutingSummary | None  # at the window the run was trained with
    separations: tuple[Separation, ...]
    routing_examples: int  # examples per domain that `routing` was measured on
    followed: dict[str, list[FollowedItem]]  # the first test items, by domain
    tokenizer: Tokenizer
    router: RouterDiagnostics | None  # for static or per-modality routing, where it matters whether experts differ

    @property
    def title(self) -> str:
        return f"AnyExperts run {self.root.resolve().name}"

    @property
    def summary(self) -> str:
        moe, stack = self.config.model.moe, self.config.model.stack
        size = count_text(parameter_count(self.config.model))
        virtual = f" and {moe.num_virtual} virtual" if moe.num_virtual else ""
        window = (
            f"Each token gets {moe.k_min:g} to {moe.k_max:g} slots, with {moe.expected_real_slots:.2f} real experts on "
            "average (nominal)."
            if moe.k_min < moe.k_max
            else f"Every token gets {moe.k_max:g} slots (static top-{moe.k_max:g})."
        )
        steps = self.config.train.steps
        shown = f"This page shows the checkpoint of step {self.step}"
        at = "There is no checkpoint yet" if self.step is None else shown
        return (
            f"A model of {size} parameters with {stack.num_moe_layers} MoE layers of {moe.num_experts} "
            f"real{virtual} experts. {window} Data: {comma_list(self.config.data.domains)}. {at} of {steps}."
        )


def require_run(root: pathlib.Path) -> None:
    """Raises UserError if there is no run in `root`."""
    path = RunDir(root).config
    require(path.exists(), f"no run in {root}: there is no {path}")


def gather(root: pathlib.Path, examples: int, mesh: Mesh | None = None) -> ReportSource:
    """Reads a run's files, and follows `examples` questions per domain through its best checkpoint.

    Raises:
      UserError: if there is no run in `root`, or one of its files is not in the format of this version.
    """
    paths = RunDir(root)
    require_run(root)
    config = load_config(paths.config)
    require_experts(config, f"no report of {root}")
    records = read_records(paths.metrics) if paths.metrics.exists() else []
    require_complete(records, paths.metrics)
    evaluation = load_evaluation(root)
    trained, no_checkpoint = _checkpoint(root, mesh)
    routing = None if evaluation is None else evaluation.trained
    separations = () if evaluation is None else evaluation.separations
    measured = 0 if evaluation is None else evaluation.examples_per_domain
    if routing is None and trained is not None:
        routing, separations = _measure(trained)
        measured = ROUTING_EXAMPLES
    return ReportSource(
        root=root,
        config=config,
        records=records,
        evaluation=evaluation,
        step=None if trained is None else trained.step,
        no_checkpoint=no_checkpoint,
        routing=routing,
        separations=separations,
        routing_examples=measured,
        followed={} if trained is None else _follow(trained, examples),
        tokenizer=BYTES if trained is None else trained.tokenizer,
        router=None if trained is None else _diagnose(trained),
    )


def _checkpoint(root: pathlib.Path, mesh: Mesh | None) -> tuple[Trained | None, str]:
    """The best checkpoint, or the reason why there is none.

    Raises:
      UserError: if there is one and it is damaged.
    """
    try:
        return load_trained(root, "best", mesh), ""
    except UserError as error:
        if RunDir(root).checkpoint_steps():
            raise
        return None, str(error)


def _measure(trained: Trained) -> tuple[RoutingSummary, tuple[Separation, ...]]:
    config = trained.config
    window = own_window(config.model.moe)
    batches = load_batches(trained, config.data.domains, "test", ROUTING_EXAMPLES, ROUTING_EXAMPLES)
    sample = sample_routing(trained, config.model, batches, window)
    return summarise(sample, config.model.moe, window), measure_separations(sample, batches, config.model.moe)


def _diagnose(trained: Trained) -> RouterDiagnostics | None:
    """EvoMoE's diagnostics; None for a plain AnyExperts model, which they say little about."""
    moe = trained.config.model.moe
    if moe.uses_importance and moe.router == "linear":
        return None
    return diagnose(trained, load_batches(trained, trained.config.data.domains, "test", *[ROUTING_EXAMPLES] * 2))


def _follow(trained: Trained, examples: int) -> dict[str, list[FollowedItem]]:
    rows = max(examples, ROUTING_EXAMPLES)
    return {name: follow(trained, name, examples, rows, _ANSWER_TOKENS) for name in trained.config.data.domains}

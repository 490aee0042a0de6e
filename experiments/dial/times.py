"""Seconds of a forward pass by policy and budget: one checkpoint of each kind, interleaved rounds, ratios to dense."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from anyexperts_jax.bench.stopwatch import interleaved_rounds
from anyexperts_jax.core.versions import device_text
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.pretrained.load import load_pretrained
from experiments.dial.measure import bench_of, setting
from experiments.dial.plan import KINDS, Plan
from experiments.dial.runs import DENSE, kept_outcome
from experiments.dial.starts import Note
from experiments.dial.verdicts import SERIES, points_of

_TOKENS = 512  # of the test text, in each pass
ALL_EXPERTS = "static k, all experts"


@dataclasses.dataclass(frozen=True)
class Times:
    """Medians over the rounds."""

    tokens: int  # of a pass
    rounds: int
    dense_seconds: float
    others_load: float | None  # mean number of cores that other processes kept busy
    device: str
    ids: dict[str, str]  # of the results, by kind
    ratios: dict[str, dict[str, float]]  # by label and budget: a pass's time over that of the dense model


def measure_times(plan: Plan, rounds: int, patience: float, note: Note) -> Times:
    """Times the checkpoints of the first seed, each at the settings at which its perplexity was measured.

    They are executed as a model is by default, even if the trainings were executed in another way.

    Args:
      patience: seconds to wait for an idle machine.

    Raises:
      UserError: if a kind was not trained yet.
    """
    tokens = min(_TOKENS, plan.test_tokens)
    dense = bench_of(plan, load_pretrained(plan.model), tokens)
    calls: dict[tuple[str, str], Callable[[], Any]] = {(DENSE, ""): lambda: dense.run(dense.m.config, None)}
    ids = {}
    for name in KINDS:
        note(f"reading the checkpoint of {name}")
        outcome, trained = kept_outcome(plan, name, note)
        model = dataclasses.replace(trained, config=trained.config.with_execution(Execution()))
        ids[name], bench = outcome.id, bench_of(plan, model, tokens)
        for series in (one for one in SERIES if one.kind == name):
            for point in points_of(outcome, series.policy):
                if point.budget in plan.budgets and point.asked is not None:
                    key = series.label, f"{point.budget:g}"
                    calls[key] = functools.partial(bench.run, *setting(bench, series.policy, point.asked))
        if name == "static":
            calls[ALL_EXPERTS, f"{plan.routed}"] = functools.partial(bench.run, model.config, None)
    note(f"timing {len(calls)} passes of {tokens} tokens in {rounds} rounds")
    found = interleaved_rounds({_name(key): call for key, call in calls.items()}, rounds, patience)
    ratios: dict[str, dict[str, float]] = {}
    for label, budget in calls:
        ratio = found.ratio(_name((label, budget)), _name((DENSE, "")))
        ratios.setdefault(label, {})[budget] = round(ratio, 3)
    return Times(
        tokens=tokens,
        rounds=rounds,
        dense_seconds=found.milliseconds(_name((DENSE, ""))) / 1e3,
        others_load=found.others_load,
        device=device_text(),
        ids=ids,
        ratios=ratios,
    )


def _name(key: tuple[str, str]) -> str:
    return " at ".join(key)

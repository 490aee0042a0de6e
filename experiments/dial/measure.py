"""Measures a checkpoint on the test text, with each policy at each budget that the text really gets."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.evaluate.dials import Inputs
from anyexperts_jax.evaluate.policies import Pass, TextBench, policy_at, text_sample
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.split import merge
from anyexperts_jax.routing.budget import nearest_budget, shift_budget
from anyexperts_jax.routing.policies import IMPORTANCE
from experiments.dial.plan import KINDS, MERGED, STATIC, Plan

TOLERANCE = 0.1  # of the realised mean, in experts per token
_TRIES = 4
_BATCH_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Point:
    """One pass over the test text."""

    policy: str
    budget: float | None  # that was wanted, in real experts per token and layer; None: the model is dense
    asked: float | None  # that the policy was set to, so that the text gets the wanted one
    realised: float | None  # that the text got
    nats: float  # per predicted token


def bench_of(plan: Plan, model: Pretrained, tokens: int | None = None) -> TextBench:
    """Returns the model with the test text.

    Args:
      tokens: how many tokens of it; None: `plan.test_tokens`.
    """
    return TextBench(model, text_sample(model, plan.test_text, tokens or plan.test_tokens, plan.length), _BATCH_ROWS)


def measure_kind(plan: Plan, name: str, model: Pretrained, note: Callable[[str], None]) -> tuple[Point, ...]:
    """Measures the checkpoint of a training with all policies of its kind, and a split by activations merged again."""
    bench, found = bench_of(plan, model), []
    for policy in KINDS[name].policies:
        budgets: Sequence[float] = plan.budgets
        if name == STATIC == policy:
            budgets = plan.static_slots
        for budget in budgets:
            found.append(point_at(bench, policy, budget))
            note(f"{name}, {policy} at {found[-1].realised:.2f} experts: perplexity {math.exp(found[-1].nats):.2f}")
    if name == STATIC:
        found.append(dense_point(MERGED, bench_of(plan, merge(model))))
    return tuple(found)


def dense_point(name: str, bench: TextBench) -> Point:
    """Measures a dense model."""
    return Point(name, None, None, None, float(bench.run(bench.m.config, None).nats_BT.mean()))


def point_at(bench: TextBench, policy: str, budget: float) -> Point:
    """Measures a policy, which is set so that the text gets the budget up to `TOLERANCE`.

    A policy's dial is found on the scores of the first batch with all experts on. Deeper layers see other scores once
    experts are missing, and importance need not average 1/2, so the setting is corrected a few times. The pass that
    came closest counts.
    """
    moe, asked = bench.m.config.moe, float(budget)
    passes: dict[float, Pass] = {}
    while len(passes) < _TRIES:
        asked = nearest_budget(moe, asked) if policy == IMPORTANCE else min(max(asked, 1.0), moe.experts_in_reach)
        if asked in passes:  # the end of what the policy can be set to
            break
        passes[asked] = run_at(bench, policy, asked)
        missing = budget - passes[asked].realised
        if abs(missing) <= TOLERANCE:
            break
        asked += missing
    asked, closest = min(passes.items(), key=lambda one: abs(one[1].realised - budget))
    return Point(policy, float(budget), asked, closest.realised, float(closest.nats_BT.mean()))


def run_at(bench: TextBench, policy: str, asked: float) -> Pass:
    """Runs one pass over the text."""
    return bench.run(*setting(bench, policy, asked))


def setting(bench: TextBench, policy: str, asked: float) -> tuple[ModelConfig, Float[Array, "*rest 2"] | None]:
    """Returns the configuration and the window of a policy at a budget. The window is an array, so that all budgets of
    a policy share a program."""
    if policy == IMPORTANCE:
        moe = shift_budget(bench.m.config.moe, asked)
        return bench.m.config, jnp.asarray((moe.k_min, moe.k_max), jnp.float32)
    first = Inputs(bench.first)
    own = policy_at(bench.m, policy, asked, first, functools.partial(getattr, bench, "seen"))
    return own.config, own.window_of(first)

"""Perplexity of a published model's answers about pictures, sounds and videos, at any budget by any policy."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anyexperts_jax.core.modality import MODALITY_NAMES
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.evaluate.dials import Inputs, Static, apply, seen_by
from anyexperts_jax.evaluate.policies import (
    DENSE,
    ORACLE,
    OWN,
    PolicyAt,
    check_asked,
    perplexity_of,
    policy_at,
    policy_names,
)
from anyexperts_jax.evaluate.records import Scored
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.train.losses import next_token_nats

ALL = "all"  # contexts together


class MediaMeasured(NamedTuple):
    """The result of one pass over the records of one context."""

    policy: str
    budget: float  # as requested, experts per token
    context: str  # what the prompts hold beside text, as "image+audio"; "text" for nothing; "all" for every record
    records: int
    nats: float  # per token of the answers
    realised: float  # real experts per token and layer, prompts included
    by_modality: dict[str, float]  # the same of the tokens of each modality that is there
    seconds: float  # of the pass over all records


def media_policy_names(m: Pretrained) -> tuple[str, ...]:
    """The policies that `measure_records` knows for a model."""
    return tuple(name for name in policy_names(m) if name not in (DENSE, ORACLE))


def measure_records(
    m: Pretrained,
    batches: Sequence[Scored],
    budgets: Sequence[float],
    policies: Sequence[str] = (),
    *,
    note: Callable[[str], None] = lambda line: None,
) -> list[MediaMeasured]:
    """Measures the model as it is, then each policy at each budget: for every context, then for all records.

    A policy's dial is set as in `evaluate.policies.measure_policies`, so that all tokens of the first batch, those of
    media included, get the budget on average; where policies tell modalities apart, they do here.

    Args:
      budgets: experts a token.
      policies: names; none: all that `media_policy_names` tells.

    Raises:
      UserError: a dense model, a policy that does not fit it, or a budget out of reach.
    """
    valid = media_policy_names(m)
    check_asked(m, budgets, policies, valid)
    first = batches[0].inputs
    seen = functools.cache(lambda: seen_by(m, first))
    compiled: set[Any] = set()

    def measured(name: str, budget: float, own: PolicyAt) -> list[MediaMeasured]:
        lines = _described(name, budget, batches, *_run_all(m, own, batches, compiled))
        note(f"{name} at {budget:g}: perplexity {perplexity_of(lines[-1].nats):.4g}, {lines[-1].seconds:.1f} s")
        return lines

    found = measured(OWN, m.config.moe.expected_real_slots, PolicyAt(m.config, lambda _: None))
    for name in policies or valid:
        for budget in budgets:
            found += measured(name, budget, policy_at(m, name, budget, first, seen))
    return found


def media_table(found: Sequence[MediaMeasured], where: str) -> TextTable:
    """One row for each pass and context, with the experts that the tokens of each modality got."""
    present = [name for name in MODALITY_NAMES if any(name in one.by_modality for one in found)]
    columns = ("policy", "budget", "context", "records", "perplexity", "experts a token", *present, "seconds")
    rows = []
    for one in found:
        row = [one.policy, f"{one.budget:g}", one.context, str(one.records), f"{perplexity_of(one.nats):.4f}"]
        row += [f"{one.realised:.3f}"]
        row += [f"{one.by_modality[name]:.3f}" if name in one.by_modality else "-" for name in present]
        rows.append((*row, f"{one.seconds:.2f}"))
    return TextTable(where, columns, tuple(rows), names=3)


def _run_all(
    m: Pretrained, own: PolicyAt, batches: Sequence[Scored], compiled: set[Any]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], float]:
    """Returns the results of a pass, and its seconds.

    Args:
      compiled: programs that have run. Each of the others first runs once without being timed, and is added.
    """
    static: Static = (own.config, m.placement)
    prepared = [(batch.inputs, own.window_of(batch.inputs)) for batch in batches]

    def run(each: tuple[Inputs, Any]) -> Any:
        return jax.block_until_ready(_run(static, m.params, m.router_bias_LC, *each))

    for each in prepared:
        leaves, structure = jax.tree.flatten(each)
        program = (own.config, structure, tuple(leaf.shape for leaf in leaves))
        if program not in compiled:
            run(each)
            compiled.add(program)
    began = time.perf_counter()
    results = jax.device_get([run(each) for each in prepared])
    return results, time.perf_counter() - began


def _described(
    name: str,
    budget: float,
    batches: Sequence[Scored],
    results: Sequence[tuple[np.ndarray, np.ndarray]],
    seconds: float,
) -> list[MediaMeasured]:
    """Returns the lines of a pass: one for each context, then one for all records."""
    contexts = [context for batch in batches for context in batch.contexts]
    named = list(dict.fromkeys(contexts))
    chosen = {context: [context == one for one in contexts] for context in named}
    if len(named) > 1:
        chosen[ALL] = [True] * len(contexts)
    found, rows = [], _rows(batches, results)
    for context, picked in chosen.items():
        kept = [row for row, taken in zip(rows, picked, strict=True) if taken]
        nats, real, modality = (np.concatenate(part) for part in zip(*kept, strict=True))
        by_modality = {MODALITY_NAMES[i]: float(real[modality == i].mean()) for i in np.unique(modality).tolist()}
        figures = (len(kept), float(nats.mean()), float(real.mean()))
        found.append(MediaMeasured(name, budget, context, *figures, by_modality=by_modality, seconds=seconds))
    return found


def _rows(
    batches: Sequence[Scored], results: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each record: the losses of its answer, and the experts and the modality of each of its tokens."""
    found = []
    for batch, (nats_BT, real_BT) in zip(batches, results, strict=True):
        assert batch.inputs.valid_BT is not None
        valid_BT, modality_BT = np.asarray(batch.inputs.valid_BT), np.asarray(batch.inputs.modality_BT)
        for row, valid_T in enumerate(valid_BT):
            nats = nats_BT[row][batch.answer_BT[row, 1:]]
            found.append((nats, real_BT[row][valid_T], modality_BT[row][valid_T]))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _run(
    static: Static, params: Any, bias_LC: Array | None, inputs: Inputs, window: Float[Array, "*rest 2"] | None
) -> tuple[Array, Array]:
    """(the loss of every token but the first, experts of every token, a mean over layers)."""
    output = apply(static, params, bias_LC, inputs, window=window)
    nats_BT = next_token_nats(output.logits_BTY, inputs.tokens_BT)[:, :-1]
    return nats_BT, output.trace.real_slots_BT.astype(jnp.float32).mean(axis=0)

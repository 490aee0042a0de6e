"""The compiled programs of the server: one decoding step of all slots, and the prefill of one slot.

The cache has one row of fixed length per slot, so shapes do not depend on which requests are running. There is one
program for a step, one for each width of a prefill piece and one for a run's prompt with media. A published model's
prompt with media takes a program for each size that its length and its media are padded to. No row depends on another
one, so an answer does not depend on the requests that run beside it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import MultimodalModel, TextPart
from anyexperts_jax.models.placed_media import PlacedMedia
from anyexperts_jax.models.sample import RowSampling, Sampling, row_tokens
from anyexperts_jax.nn.stack import StackCache, empty_stack_cache
from anyexperts_jax.pretrained.budget import window_arguments, with_budget
from anyexperts_jax.routing.policies import IMPORTANCE
from anyexperts_jax.routing.trace import RoutingTrace, real_by_modality
from anyexperts_jax.sharding.placement import Placement

MOST_ALTERNATIVES = 20  # most likely tokens whose probabilities can be reported
Static = tuple[ModelConfig, Placement]


class RowBudget(NamedTuple):
    """How many experts a request's tokens get."""

    k_min: float
    k_max: float
    share: float  # of positions that get k_max, where a fixed policy mixes two windows; unused with importance


class Rows(NamedTuple):
    """The inputs of a program, by row: tokens and their positions, budget and sampling."""

    tokens_BT: Int[Array, "B T"]
    start_B: Int[Array, "B"]  # position of the first token
    length_B: Int[Array, "B"]  # valid tokens; 0: the row rests
    window_B2: Float[Array, "B 2"]
    share_B: Float[Array, "B"]
    sampling: RowSampling
    tells: Bool[Array, ""]  # whether any row asks for probabilities
    lead_B: Float[Array, "B"] | None = None  # by how much rotary positions lag; None: the model reads text only


class Chosen(NamedTuple):
    """The next token of each row. Probabilities are zeros if no row asks for them."""

    tokens_B: Int[Array, "B"]
    logprobs_B: Float[Array, "B"]
    top_ids_BX: Int[Array, "B X"]
    top_logprobs_BX: Float[Array, "B X"]
    real_BLM: Int[Array, "B L M"]  # real experts used by the row's tokens, in each MoE layer, by modality
    read_BM: Int[Array, "B M"]  # the row's tokens, by modality


def row_budget(base: ModelConfig, served: ModelConfig, budget: float | None) -> RowBudget:
    """Turns a request's budget into the window of its row.

    Args:
      base: the model's own configuration.
      served: the same with the slots that the server was started with room for.
      budget: real experts per token; None: the model's own window.

    Raises:
      UserError: if the model cannot reach the budget, or it needs more slots than the server has room for.
    """
    if budget is None:
        return RowBudget(float(base.moe.k_min), float(base.moe.k_max), 1.0)
    follows = base.moe.policy
    require(follows == IMPORTANCE, f"budget={budget:g}: the model's experts follow policy={follows!r}, not a budget")
    roomy, in_force = with_budget(base, budget)
    require(
        roomy.moe.slots_bound <= served.moe.slots_bound,
        f"budget={budget:g} needs {roomy.moe.slots_bound} slots a token, the server was started with room for "
        f"{served.moe.slots_bound}; start it with --max-budget {budget:g}",
    )
    assert in_force.window is not None
    k_min, k_max = (float(value) for value in np.asarray(in_force.window))
    return RowBudget(k_min, k_max, 1.0 if in_force.share is None else float(in_force.share))


def make_rows(
    tokens_BT: np.ndarray,
    start: list[int],
    length: list[int],
    budgets: list[RowBudget],
    *,
    draws: list[tuple[Sampling, int, int]],
    tells: bool,
    leads: list[float] | None = None,
) -> Rows:
    """Collects the arrays of a program.

    Args:
      draws: for each row how it is sampled, its seed, and how many tokens it has drawn so far.
      leads: by how much the rotary positions of each row lag behind its places; None: the model reads text only.
    """
    sampling = RowSampling(
        jnp.asarray([one.temperature for one, _, _ in draws], jnp.float32),
        jnp.asarray([one.top_k for one, _, _ in draws], jnp.int32),
        jnp.asarray([one.top_p for one, _, _ in draws], jnp.float32),
        jnp.asarray([one.min_p for one, _, _ in draws], jnp.float32),
        seed_B=jnp.asarray(np.array([seed for _, seed, _ in draws], np.uint32)),
        step_B=jnp.asarray([step for _, _, step in draws], jnp.int32),
    )
    return Rows(
        jnp.asarray(tokens_BT, jnp.int32),
        jnp.asarray(start, jnp.int32),
        jnp.asarray(length, jnp.int32),
        jnp.asarray([(one.k_min, one.k_max) for one in budgets], jnp.float32),
        share_B=jnp.asarray([one.share for one in budgets], jnp.float32),
        sampling=sampling,
        tells=jnp.asarray(tells),
        lead_B=None if leads is None else jnp.asarray(leads, jnp.float32),
    )


def slot_cache(config: ModelConfig, slots: int, length: int) -> StackCache:
    """Returns an empty cache with `length` positions per slot, whose buffers may be donated."""
    cache: StackCache = jax.tree.map(jnp.copy, empty_stack_cache(config.stack, slots, length))
    return cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def step_slots(
    static: Static, params: Any, router_bias_LC: Array | None, rows: Rows, cache: StackCache
) -> tuple[Chosen, StackCache]:
    """Decodes one more token in every slot that does not rest.

    A resting slot also writes one cache entry, at its `start_B`. This is harmless: its next token overwrites the entry
    before anything reads it.
    """
    return _extend(static, params, router_bias_LC, rows, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def extend_slot(
    static: Static, params: Any, router_bias_LC: Array | None, rows: Rows, cache: StackCache, slot: Int[Array, ""]
) -> tuple[Chosen, StackCache]:
    """Prefills a piece of one slot's prompt (B = 1) and chooses the token after it."""
    chosen, own = _extend(static, params, router_bias_LC, rows, _take_row(cache, slot))
    return chosen, _put_row(cache, own, slot)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def show_slot(
    static: Static,
    params: Any,
    router_bias_LC: Array | None,
    given: tuple[Rows, PlacedMedia],
    cache: StackCache,
    slot: Array,
) -> tuple[Chosen, StackCache]:
    """Prefills a published model's whole prompt with media in one slot (B = 1) and chooses the token after it."""
    rows, media = given
    rows = rows._replace(lead_B=None)  # what is shown has rotary positions of its own
    chosen, own = _extend(static, params, router_bias_LC, rows, _take_row(cache, slot), media=media)
    return chosen, _put_row(cache, own, slot)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def prefill_slot(
    static: Static, params: Any, router_bias_LC: Array | None, given: tuple[Batch, Rows], cache: StackCache, slot: Array
) -> tuple[Chosen, StackCache]:
    """Prefills one slot (B = 1) with a whole prompt that has media, and chooses the token after it."""
    (config, placement), (batch, rows) = static, given
    positions_BT = jnp.broadcast_to(jnp.arange(batch.tokens_BT.shape[1])[None], batch.tokens_BT.shape)
    logits_BY, trace, own = MultimodalModel(config, placement).apply(
        {"params": params},
        batch,
        _take_row(cache, slot),
        router_bias_LC=router_bias_LC,
        **_policy(config, rows, positions_BT),
        method="prefill",
    )
    kinds = (jnp.asarray(batch.modality_BT), jnp.asarray(batch.valid_BT))
    return _chosen(rows, logits_BY, trace, kinds), _put_row(cache, own, slot)


def _extend(
    static: Static,
    params: Any,
    router_bias_LC: Array | None,
    rows: Rows,
    cache: StackCache,
    media: PlacedMedia | None = None,
) -> tuple[Chosen, StackCache]:
    config, placement = static
    place_1T = jnp.arange(rows.tokens_BT.shape[1], dtype=jnp.int32)[None]
    logits_BY, trace, cache = MultimodalModel(config, placement).apply(
        {"params": params},
        TextPart(rows.tokens_BT, rows.start_B, rows.length_B, rows.lead_B),
        cache,
        router_bias_LC=router_bias_LC,
        **_policy(config, rows, rows.start_B[:, None] + place_1T),
        placed=media,
        method="extend",
    )
    text_BT = jnp.full_like(rows.tokens_BT, Modality.TEXT)
    kinds = (text_BT if media is None else jnp.asarray(media.modality_BT), place_1T < rows.length_B[:, None])
    return _chosen(rows, logits_BY, trace, kinds), cache


def _policy(config: ModelConfig, rows: Rows, positions_BT: Int[Array, "B T"]) -> dict[str, Any]:
    """Returns the window of each token, and what mixes two windows where a fixed policy decides."""
    window_BT2 = jnp.broadcast_to(rows.window_B2[:, None], (*positions_BT.shape, 2))
    return window_arguments(config, window_BT2, rows.share_B[:, None], positions_BT)


def _chosen(
    rows: Rows,
    logits_BY: Float[Array, "B Y"],
    trace: RoutingTrace,
    kinds: tuple[Int[Array, "B T"], Bool[Array, "B T"]],
) -> Chosen:
    """Chooses each row's next token.

    Args:
      kinds: modalities of the tokens that were read, and which of them are valid.
    """
    tokens_B = row_tokens(rows.sampling, logits_BY)
    alternatives = min(MOST_ALTERNATIVES, logits_BY.shape[-1])

    def probabilities() -> tuple[Array, Array, Array]:
        logprobs_BY = jax.nn.log_softmax(logits_BY.astype(jnp.float32), axis=-1)
        top_BX, ids_BX = jax.lax.top_k(logprobs_BY, alternatives)
        own_B = jnp.take_along_axis(logprobs_BY, tokens_B[:, None], axis=-1)[:, 0]
        return own_B, ids_BX.astype(jnp.int32), top_BX

    def zeros() -> tuple[Array, Array, Array]:
        shape = (logits_BY.shape[0], alternatives)
        return jnp.zeros(shape[:1], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    logprobs_B, top_ids_BX, top_logprobs_BX = jax.lax.cond(rows.tells, probabilities, zeros)
    real_BLM, read_BM = real_by_modality(trace, *kinds)
    return Chosen(tokens_B, logprobs_B, top_ids_BX, top_logprobs_BX, real_BLM, read_BM=read_BM)


def _take_row(cache: StackCache, slot: Array) -> StackCache:
    row: StackCache = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, slot, 1, a.ndim - 4), cache)
    return row


def _put_row(cache: StackCache, row: StackCache, slot: Array) -> StackCache:
    whole: StackCache = jax.tree.map(
        lambda a, own: jax.lax.dynamic_update_slice_in_dim(a, own, slot, a.ndim - 4), cache, row
    )
    return whole

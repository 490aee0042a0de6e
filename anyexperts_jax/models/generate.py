"""Greedy generation with a key/value cache."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import Batch, require_one_segment
from anyexperts_jax.core.errors import require
from anyexperts_jax.dispatch.execution import BUFFERED
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.nn.stack import StackCache, empty_stack_cache
from anyexperts_jax.routing.window import check_window
from anyexperts_jax.sharding.placement import Placement, is_split, placement_of
from anyexperts_jax.sharding.specs import shard_batch


def generate(
    config: ModelConfig,
    params: Any,
    prompt_batch: Batch,
    *,
    max_new_tokens: int,
    window: Float[Array, "2"] | None = None,
    router_bias_LC: Float[Array, "L *M C"] | None = None,
    stop_ids: tuple[int, ...] = (),
) -> Int[Array, "B J"]:
    """The most likely continuation of each prompt, token by token, J = max_new_tokens of them.

    `eos_id` or one of `stop_ids` ends a sequence and is the last token written; `pad_id` follows. A sequence also ends
    when it reaches the model's `max_length` positions, without an end token. An empty prompt (all padding) yields only
    padding, and so does a prompt that already fills `max_length`. Compiled once for each configuration and set of
    shapes.

    No slot is dropped. Where the buffers of `stack.execution` can overflow ("capacity", "exchange"), decoding runs
    "blocks" instead, which gives the same values wherever those drop nothing. So an answer does not depend on the
    other rows of its batch.

    If `params` lie on a mesh, the prompts are split over its batch axes, whose size must divide their number. Positions
    are not split, because decoding takes them one by one.

    Args:
      prompt_batch: right-padded prompts, `BOS media question SEP`, of any length each.
      window, router_bias_LC: as for `MultimodalModel`.
      stop_ids: further tokens that end a sequence, as some vocabularies have.

    Raises:
      UserError: when max_new_tokens < 1, the batch does not fit the model or the mesh, or a row of it has several
        segments.
    """
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be >= 1")
    require_one_segment(prompt_batch, "generation continues one prompt a row")
    if window is not None:
        check_window(config.moe, window)
    placement = placement_of(params)
    if is_split(placement):
        placement = dataclasses.replace(placement, rules=dataclasses.replace(placement.rules, length=None))
        prompt_batch = shard_batch(placement.mesh, prompt_batch, rules=placement.rules)
    static = (dropless(config), max_new_tokens, tuple(sorted({config.eos_id, *stop_ids})), placement)
    return _generate(static, params, prompt_batch, window, router_bias_LC)


def dropless(config: ModelConfig) -> ModelConfig:
    """The same model with a dispatch that drops no slot.

    The size of a buffer follows from the number of tokens, which is B at a step of decoding. Which slots overflow would
    depend on which prompts share the batch, and a step keeps no trace in which drops could be counted.
    """
    execution = config.stack.execution
    if execution.dispatch not in BUFFERED:
        return config
    return config.with_execution(dataclasses.replace(execution, dispatch="blocks"))


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    static: tuple[ModelConfig, int, tuple[int, ...], Placement],
    params: Any,
    prompt_batch: Batch,
    window: Float[Array, "2"] | None,
    router_bias_LC: Float[Array, "L *M C"] | None,
) -> Int[Array, "B J"]:
    config, max_new_tokens, stop_ids, placement = static
    run: Callable[..., Any] = functools.partial(
        MultimodalModel(config, placement).apply, {"params": params}, window=window, router_bias_LC=router_bias_LC
    )
    batch_size, length = prompt_batch.tokens_BT.shape
    lengths_B = prompt_batch.valid_BT.sum(axis=1)
    room_B = jnp.where(lengths_B == 0, 0, jnp.minimum(config.max_length - lengths_B, max_new_tokens))
    cache = empty_stack_cache(config.stack, batch_size, min(length + max_new_tokens - 1, config.max_length))
    logits_BY, _, cache = run(prompt_batch, cache, method="prefill")

    def step(tokens_B: Array, j: Array, live_B: Array, cache: StackCache) -> tuple[Array, StackCache]:
        return run(tokens_B, lengths_B + j, live_B, cache, method="step")

    ends = Ends(room_B, stop_ids, config.pad_id)
    return greedy_tokens(step, logits_BY, cache, ends, max_new_tokens)


class Ends(NamedTuple):
    """Where sequences end."""

    room_B: Int[Array, "B"]  # the most tokens each may take
    stop_ids: tuple[int, ...]  # the last token of one that ends before is one of these
    pad_id: int  # written after the end


Step = Callable[[Int[Array, "B"], Int[Array, ""], Bool[Array, "B"], Any], tuple[Float[Array, "B Y"], Any]]


def greedy_tokens(
    step: Step, logits_BY: Float[Array, "B Y"], cache: Any, ends: Ends, max_new_tokens: int
) -> Int[Array, "B J"]:
    """The most likely token after each sequence, and so on, J = max_new_tokens of them.

    Token 0 follows from `logits_BY`, and each later one from a step on the token before it. So J tokens take J - 1
    steps, or fewer if every sequence ends earlier.

    Args:
      step: (tokens number j, j, which sequences go on, cache) -> logits of token j + 1, and the cache. Rows that have
        ended may hold anything.
    """

    def choose(j: Array, logits_BY: Array, done_B: Array, tokens_BJ: Array) -> tuple[Array, Array]:
        next_B = jnp.where(done_B, ends.pad_id, jnp.argmax(logits_BY, axis=-1).astype(jnp.int32))
        return done_B | jnp.isin(next_B, jnp.array(ends.stop_ids)) | (j + 1 >= ends.room_B), tokens_BJ.at[:, j].set(
            next_B
        )

    def unfinished(state: tuple[Array, Array, Array, Any]) -> Array:
        j, done_B, _, _ = state
        return (j + 1 < max_new_tokens) & ~done_B.all()

    def advance(state: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        j, done_B, tokens_BJ, cache = state
        logits_BY, cache = step(tokens_BJ[:, j], j, ~done_B, cache)
        done_B, tokens_BJ = choose(j + 1, logits_BY, done_B, tokens_BJ)
        return j + 1, done_B, tokens_BJ, cache

    empty_BJ = jnp.full((logits_BY.shape[0], max_new_tokens), ends.pad_id, jnp.int32)
    first = jnp.int32(0)
    state = (first, *choose(first, logits_BY, ends.room_B <= 0, empty_BJ), cache)
    return jax.lax.while_loop(unfinished, advance, state)[2]

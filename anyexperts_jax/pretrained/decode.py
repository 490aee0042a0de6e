"""Batched decoding with a key/value cache, for prompts of different lengths."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.rounding import round_up
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.generate import dropless
from anyexperts_jax.models.multimodal import MultimodalModel, TextPart
from anyexperts_jax.models.placed_media import PlacedMedia
from anyexperts_jax.models.sample import GREEDY, Sampling, next_tokens
from anyexperts_jax.nn.stack import StackCache, empty_stack_cache
from anyexperts_jax.pretrained.budget import BudgetInForce, mixing_logits
from anyexperts_jax.pretrained.media import Shown
from anyexperts_jax.pretrained.placing import Placed, place
from anyexperts_jax.sharding.placement import Placement, is_split
from anyexperts_jax.sharding.specs import parts

_PROMPT_STEP, _CACHE_STEP = 16, 64  # lengths are rounded up to multiples of these, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's configuration with its parameters on their devices."""

    config: ModelConfig
    placement: Placement
    params: Any
    router_bias_LC: Float[Array, "L *M C"] | None


@dataclasses.dataclass(frozen=True)
class Request:
    """How prompts are continued."""

    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


class Decoded(NamedTuple):
    """The result of `decode`."""

    tokens: list[list[int]]  # of each row, including the token that ended it
    real_experts: float  # per token and MoE layer, over the prompts and all steps; nan for a dense model
    prefill_seconds: float
    decode_seconds: float  # of the steps after the first token
    steps: int


OnToken = Callable[[int, int], bool]  # (row, token) -> whether the row continues


def decode(
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    request: Request,
    budget: BudgetInForce,
    on_token: OnToken,
    *,
    shown: Shown | None = None,
) -> Decoded:
    """Continues every prompt, one token per step, until all rows have ended.

    Args:
      on_token: called with each token; returns whether its row continues.
      shown: the pictures, videos and sounds that the prompts have placeholders for.

    Raises:
      UserError: if a prompt is empty or longer than the model's positions, or max_new_tokens < 1.
    """
    _check(weights.config, prompts, request)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest, most = max(map(len, prompts)), weights.config.max_length
    width = min(round_up(longest, _PROMPT_STEP), most)
    room = min(round_up(longest + request.max_new_tokens, _CACHE_STEP), most)
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    seen_BY = np.zeros((len(prompts), weights.config.vocab_size), bool)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
        seen_BY[row, list(prompt)] = True
    placed = None if shown is None else place(shown, tokens_BT, np.arange(width)[None] < lengths_B[:, None])
    state = _State(weights, request, budget, batch=len(prompts), room=room, seen_BY=jnp.asarray(seen_BY))

    began = time.perf_counter()
    next_B = state.extend(tokens_BT, np.zeros_like(lengths_B), lengths_B, placed)
    first = time.perf_counter()
    found: list[list[int]] = [[] for _ in prompts]
    live_B = np.ones(len(prompts), bool)
    steps = 0
    while True:
        for row in np.nonzero(live_B)[0].tolist():
            found[row].append(int(next_B[row]))
            ended = found[row][-1] in request.stop_ids or len(found[row]) == request.max_new_tokens
            live_B[row] = on_token(row, found[row][-1]) and not ended and lengths_B[row] + len(found[row]) < room
        if not live_B.any():
            break
        start_B = lengths_B + np.array([len(own) for own in found], np.int32) - 1
        next_B = state.extend(next_B[:, None], start_B, live_B.astype(np.int32))
        steps += 1
    return Decoded(found, state.mean_real_experts(), first - began, time.perf_counter() - first, steps)


class _State:
    """What changes from step to step: the cache, the ids seen by each row, and the count of experts used."""

    def __init__(
        self, weights: Weights, request: Request, budget: BudgetInForce, batch: int, room: int, seen_BY: Array
    ) -> None:
        config = dropless(weights.config)
        self._static = (config, weights.placement, request.sampling)
        self._weights, self._budget = weights, budget
        empty = empty_stack_cache(config.stack, batch, room)
        # The arrays are donated, and an empty cache may share one buffer for keys and values: hence the copy.
        self._cache: StackCache = jax.tree.map(
            lambda array: jax.device_put(jnp.copy(array), cache_sharding(weights.placement, array.shape)), empty
        )
        self._seen_BY, self._key = seen_BY, jax.random.key(request.seed)
        self._step, self._used, self._asked = 0, list[Array](), 0
        self._lead_B: Array | None = None  # how far rotary positions lag behind; known once media are placed

    def extend(
        self, tokens_BT: np.ndarray, start_B: np.ndarray, length_B: np.ndarray, placed: Placed | None = None
    ) -> np.ndarray:
        """Appends tokens to the rows and returns the next token of each."""
        part = TextPart(jnp.asarray(tokens_BT), jnp.asarray(start_B), jnp.asarray(length_B), self._lead_B)
        held = (self._cache, self._seen_BY)
        media = None if placed is None else placed.media
        arguments = (self._weights.params, self._weights.router_bias_LC, self._budget, (part, media))
        self._lead_B = self._lead_B if placed is None else placed.lead_B
        next_B, used, held = extend_step(self._static, *arguments, held, (self._key, jnp.int32(self._step)))
        self._cache, self._seen_BY = held
        self._step += 1
        self._used.append(used)
        self._asked += int(length_B.sum())
        return np.asarray(next_B)

    def mean_real_experts(self) -> float:
        layers = self._weights.config.stack.num_moe_layers
        return sum(map(float, self._used)) / (self._asked * layers) if layers else float("nan")


def cache_sharding(placement: Placement, shape: Sequence[int]) -> jax.sharding.Sharding:
    """Returns the sharding of keys or values [..., B, S, G, A]: by rows and heads, where the mesh divides them."""
    if not is_split(placement):
        return jax.sharding.SingleDeviceSharding(placement.device)
    mesh, rules = placement.mesh, placement.rules
    rows, _, heads, _ = shape[-4:]
    split = [
        axes if size % parts(mesh, axes) == 0 else None for size, axes in ((rows, rules.batch), (heads, rules.kv_heads))
    ]
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 4), split[0], None, split[1], None))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def extend_step(
    static: tuple[ModelConfig, Placement, Sampling],
    params: Any,
    router_bias_LC: Array | None,
    budget: BudgetInForce,
    given: tuple[TextPart, PlacedMedia | None],
    held: tuple[StackCache, Array],
    draw: tuple[Array, Array],
) -> tuple[Array, Array, tuple[StackCache, Array]]:
    """Appends tokens to the rows.

    Args:
      given: the tokens, and the media that they have placeholders for.
      held: the cache, and which ids each row has seen; both are donated.
      draw: the random key, and the number of the step.

    Returns:
      The next token of each row, the number of real experts used, and the updated `held`.
    """
    config, placement, sampling = static
    (part, placed), (cache, seen_BY) = given, held
    length = part.tokens_BT.shape[1]
    logits_BT = None
    if budget.share is not None:
        positions_BT = part.start_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        logits_BT = mixing_logits(budget.share, positions_BT)
    logits_BY, trace, cache = MultimodalModel(config, placement).apply(
        {"params": params},
        part,
        cache,
        router_bias_LC=router_bias_LC,
        window=budget.window,
        importance_logits_BT=logits_BT,
        placed=placed,
        method="extend",
    )
    next_B = next_tokens(sampling, logits_BY, seen_BY, *draw)
    seen_BY = seen_BY.at[jnp.arange(next_B.shape[0]), next_B].set(True)
    return next_B, trace.real_slots_BT.sum(), (cache, seen_BY)


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], request: Request) -> None:
    require(request.max_new_tokens >= 1, f"max_new_tokens={request.max_new_tokens} must be >= 1")
    require(len(prompts) > 0, "there is no prompt")
    for prompt in prompts:
        require(len(prompt) > 0, "the prompt is empty; give at least one token")
        require(
            len(prompt) < config.max_length,
            f"the prompt has {len(prompt)} tokens, but the model's cache ends at {config.max_length} positions; "
            "shorten it",
        )
        top = max(prompt)
        require(top < config.vocab_size, f"the prompt holds the id {top}; the model has {config.vocab_size} ids")

"""Log likelihoods of continuations, and how many real experts they used."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import make_batch
from anyexperts_jax.core.rounding import round_up
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.generate import dropless
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.pretrained.budget import window_arguments
from anyexperts_jax.pretrained.decode import Weights
from anyexperts_jax.serve.slots import RowBudget
from anyexperts_jax.sharding.placement import Placement

_LENGTH_STEP = 32  # lengths are rounded up to a multiple of it, so that few programs are compiled


class Pair(NamedTuple):
    """A context and its continuation, as ids; the context has at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Used:
    """Sums up real experts, by MoE layer, and the tokens that used them."""

    def __init__(self, layers: int) -> None:
        self._real_L, self._tokens = np.zeros(layers, np.float64), 0

    def add(self, real_L: Any, tokens: int) -> None:
        self._real_L = self._real_L + np.asarray(real_L, np.float64)
        self._tokens += tokens

    @property
    def by_layer(self) -> tuple[float, ...]:
        """Real experts per token in each MoE layer; () for a dense model or before anything was counted."""
        return tuple((self._real_L / self._tokens).tolist()) if self._tokens else ()


def log_likelihoods(
    weights: Weights, pairs: Sequence[Pair], budget: RowBudget, *, rows: int, longest: int, used: Used
) -> list[tuple[float, bool]]:
    """Returns for each continuation its log likelihood, and whether greedy decoding would produce it.

    A pair of more than `longest` + 1 tokens is cut at its beginning.

    Args:
      rows: batch size.
      used: adds up the experts used.
    """
    config = dropless(weights.config)
    static = (config, weights.placement)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].context) - len(pairs[i].continuation))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for begin in range(0, len(order), rows):
        numbers = order[begin : begin + rows]
        arrays, tokens = _pad(config, [pairs[i] for i in numbers], rows, longest)
        window = jnp.asarray((budget.k_min, budget.k_max), jnp.float32)
        logprob_B, likeliest_B, real_L = _scores(
            static, weights.params, weights.router_bias_LC, arrays, (window, jnp.float32(budget.share))
        )
        used.add(real_L, tokens)
        logprobs, likeliest = np.asarray(logprob_B).tolist(), np.asarray(likeliest_B).tolist()
        for row, i in enumerate(numbers):
            found[i] = (logprobs[row], likeliest[row])
    return found


class _Arrays(NamedTuple):
    tokens_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]
    next_BT: Int[Array, "B T"]
    scored_BT: Bool[Array, "B T"]  # where the next token belongs to the continuation


def _pad(config: ModelConfig, pairs: Sequence[Pair], rows: int, longest: int) -> tuple[_Arrays, int]:
    texts = [(*pair.context, *pair.continuation)[-(longest + 1) :] for pair in pairs]
    width = round_up(max(len(text) - 1 for text in texts), _LENGTH_STEP)
    width = min(width, config.max_length)
    tokens_BT, next_BT = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    valid_BT, scored_BT = np.zeros((rows, width), bool), np.zeros((rows, width), bool)
    for row, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        last = len(text) - 1
        tokens_BT[row, :last], next_BT[row, :last] = text[:-1], text[1:]
        valid_BT[row, :last] = True
        scored_BT[row, max(last - len(pair.continuation), 0) : last] = True
    return _Arrays(*map(jnp.asarray, (tokens_BT, valid_BT, next_BT, scored_BT))), int(valid_BT.sum())


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    static: tuple[ModelConfig, Placement],
    params: Any,
    router_bias_LC: Array | None,
    arrays: _Arrays,
    budget: tuple[Float[Array, "2"], Float[Array, ""]],
) -> tuple[Float[Array, "B"], Bool[Array, "B"], Float[Array, " L"]]:
    (config, placement), (window, share) = static, budget
    place_1T = jnp.arange(arrays.tokens_BT.shape[1], dtype=jnp.int32)[None]
    policy = window_arguments(config, window, share, jnp.broadcast_to(place_1T, arrays.tokens_BT.shape))
    batch = make_batch(arrays.tokens_BT, valid_BT=arrays.valid_BT, **_empty_media(config, arrays.tokens_BT.shape[0]))
    output: Any = MultimodalModel(config, placement).apply(
        {"params": params}, batch, router_bias_LC=router_bias_LC, **policy
    )
    logprobs_BTY = jax.nn.log_softmax(output.logits_BTY, axis=-1)
    own_BT = jnp.take_along_axis(logprobs_BTY, arrays.next_BT[:, :, None], axis=-1)[:, :, 0]
    likeliest_BT = jnp.argmax(logprobs_BTY, axis=-1) == arrays.next_BT
    logprob_B = jnp.where(arrays.scored_BT, own_BT, 0.0).sum(axis=1)
    real_L = output.trace.real_slots_BT.sum(axis=(1, 2)).astype(jnp.float32)
    return logprob_B, (likeliest_BT | ~arrays.scored_BT).all(axis=1), real_L


def _empty_media(config: ModelConfig, rows: int) -> dict[str, Array]:
    """Returns empty inputs for the encoders of a model that reads media."""
    found = {}
    if config.vision is not None:
        found["patches_BPX"] = jnp.zeros((rows, 1, config.vision.patch_features), jnp.float32)
    if config.audio is not None:
        found["frames_BSX"] = jnp.zeros((rows, 1, config.audio.frame_features), jnp.float32)
    return found

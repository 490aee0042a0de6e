"""Log likelihoods of continuations, and how many real experts they used."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import Batch, make_batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.core.rounding import round_up
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.generate import dropless
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.placed_media import PlacedMedia
from anyexperts_jax.pretrained.budget import window_arguments
from anyexperts_jax.pretrained.decode import Weights
from anyexperts_jax.pretrained.placing import Placed
from anyexperts_jax.routing.trace import real_by_modality
from anyexperts_jax.serve.engine import Prompt
from anyexperts_jax.serve.slots import RowBudget
from anyexperts_jax.serve.usage import Spent
from anyexperts_jax.sharding.placement import Placement

_LENGTH_STEP = 32  # lengths are rounded up to a multiple of it, so that few programs are compiled
_MEDIA_STEP = 64  # the same with media


class Pair(NamedTuple):
    """A context and its continuation, as ids; the context has at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Used:
    """Sums up real experts, by MoE layer and modality, and the tokens that used them."""

    def __init__(self, layers: int) -> None:
        self._spent = Spent.nothing(layers)

    def add(self, spent: Spent) -> None:
        self._spent = self._spent.plus(spent)

    @property
    def by_layer(self) -> tuple[float, ...]:
        """Real experts per token in each MoE layer; () for a dense model or before anything was counted."""
        return self._spent.by_layer

    @property
    def by_modality(self) -> dict[str, tuple[float, ...]]:
        """The same for each modality that had tokens, by its name; {} for a dense model."""
        return self._spent.by_modality


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
        arrays = _pad(config, [pairs[i] for i in numbers], rows, longest)
        for i, answer in zip(numbers, _run(static, weights, arrays, budget, used), strict=False):  # rows of padding
            found[i] = answer
    return found


def log_likelihood_after(
    weights: Weights, prompt: Prompt, continuation: Sequence[int], budget: RowBudget, used: Used
) -> tuple[float, bool]:
    """Returns the log likelihood of a continuation of a prompt with media, and whether greedy decoding would give it.

    Raises:
      UserError: if both together do not fit into the model's positions.
    """
    config = dropless(weights.config)
    arrays = _continued(config, prompt, tuple(continuation))
    (found,) = _run((config, weights.placement), weights, arrays, budget, used)
    return found


def _run(
    static: tuple[ModelConfig, Placement], weights: Weights, arrays: "_Arrays", budget: RowBudget, used: Used
) -> list[tuple[float, bool]]:
    window = jnp.asarray((budget.k_min, budget.k_max), jnp.float32)
    arguments = (weights.params, weights.router_bias_LC, arrays, (window, jnp.float32(budget.share)))
    logprob_B, likeliest_B, real_LM, tokens_M = jax.device_get(_scores(static, *arguments))
    used.add(Spent(real_LM, tokens_M))
    return list(zip(logprob_B.tolist(), likeliest_B.tolist(), strict=True))


class _Arrays(NamedTuple):
    batch: Batch
    next_BT: Int[Array, "B T"]
    scored_BT: Bool[Array, "B T"]  # where the next token belongs to the continuation
    placed: PlacedMedia | None = None  # what the towers of a published model read


def _pad(config: ModelConfig, pairs: Sequence[Pair], rows: int, longest: int) -> _Arrays:
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
    batch = make_batch(tokens_BT, valid_BT=valid_BT, **_empty_media(config, rows))
    return _Arrays(batch, jnp.asarray(next_BT), jnp.asarray(scored_BT))


def _continued(config: ModelConfig, prompt: Prompt, continuation: tuple[int, ...]) -> _Arrays:
    """Returns one row: a prompt with media and, after it, its continuation without the last token."""
    ids, first = (*prompt.tokens, *continuation), len(prompt.tokens)
    last = len(ids) - 1
    room = config.max_length if prompt.batch is None else prompt.batch.tokens_BT.shape[1]
    message = f"the prompt has {first} tokens with its media and the answer {len(continuation)}, the model {room}"
    require(last <= room, f"{message} positions")
    width = min(round_up(last, _MEDIA_STEP), room) if prompt.batch is None else room
    tokens_1T, next_1T = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
    tokens_1T[0, :last], next_1T[0, :last] = ids[:-1], ids[1:]
    place_1T = np.arange(width, dtype=np.int32)[None]
    valid_1T, scored_1T = place_1T < last, (place_1T >= first - 1) & (place_1T < last)
    scored = (jnp.asarray(next_1T), jnp.asarray(scored_1T))
    if prompt.placed is not None:
        batch = make_batch(tokens_1T, valid_BT=valid_1T, **_empty_media(config, 1))
        return _Arrays(batch, *scored, _text_after(prompt.placed, first, width))
    assert prompt.batch is not None
    after_1T = place_1T >= first
    held = {name: np.asarray(getattr(prompt.batch, name)) for name in ("modality_BT", "time_BT", "segment_BT")}
    fields = {name: np.where(after_1T, np.zeros_like(own), own) for name, own in held.items()}
    position_1T = np.where(after_1T, place_1T, np.asarray(prompt.batch.position_BT))
    return _Arrays(
        dataclasses.replace(prompt.batch, tokens_BT=tokens_1T, valid_BT=valid_1T, position_BT=position_1T, **fields),
        *scored,
    )


def _text_after(placed: Placed, first: int, width: int) -> PlacedMedia:
    """Returns media whose prompt of `first` tokens is followed by text, up to `width` positions."""
    media, text_T = placed.media, np.arange(first, width)
    row_1T, modality_1T = np.full((1, width), -1, np.int32), np.full((1, width), int(Modality.TEXT), np.int32)
    rotary_1T3 = np.zeros((1, width, 3), np.float32)
    row_1T[:, :first] = np.asarray(media.row_BT)[:, :first]
    modality_1T[:, :first] = np.asarray(media.modality_BT)[:, :first]
    rotary_1T3[:, :first] = np.asarray(media.rotary_BT3)[:, :first]
    rotary_1T3[0, first:] = (text_T - np.asarray(placed.lead_B)[0])[:, None]
    return dataclasses.replace(media, row_BT=row_1T, modality_BT=modality_1T, rotary_BT3=rotary_1T3)


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    static: tuple[ModelConfig, Placement],
    params: Any,
    router_bias_LC: Array | None,
    arrays: _Arrays,
    budget: tuple[Float[Array, "2"], Float[Array, ""]],
) -> tuple[Float[Array, "B"], Bool[Array, "B"], Int[Array, "L M"], Int[Array, " M"]]:
    (config, placement), (window, share), batch = static, budget, arrays.batch
    place_1T = jnp.arange(batch.tokens_BT.shape[1], dtype=jnp.int32)[None]
    policy = window_arguments(config, window, share, jnp.broadcast_to(place_1T, batch.tokens_BT.shape))
    output: Any = MultimodalModel(config, placement).apply(
        {"params": params}, batch, router_bias_LC=router_bias_LC, placed=arrays.placed, **policy
    )
    logprobs_BTY = jax.nn.log_softmax(output.logits_BTY, axis=-1)
    own_BT = jnp.take_along_axis(logprobs_BTY, arrays.next_BT[:, :, None], axis=-1)[:, :, 0]
    likeliest_BT = jnp.argmax(logprobs_BTY, axis=-1) == arrays.next_BT
    logprob_B = jnp.where(arrays.scored_BT, own_BT, 0.0).sum(axis=1)
    modality_BT = jnp.asarray(batch.modality_BT if arrays.placed is None else arrays.placed.modality_BT)
    real_BLM, tokens_BM = real_by_modality(output.trace, modality_BT, jnp.asarray(batch.valid_BT))
    return logprob_B, (likeliest_BT | ~arrays.scored_BT).all(axis=1), real_BLM.sum(axis=0), tokens_BM.sum(axis=0)


def _empty_media(config: ModelConfig, rows: int) -> dict[str, Array]:
    """Returns empty inputs for the encoders of a model that reads media."""
    found = {}
    if config.vision is not None:
        found["patches_BPX"] = jnp.zeros((rows, 1, config.vision.patch_features), jnp.float32)
    if config.audio is not None:
        found["frames_BSX"] = jnp.zeros((rows, 1, config.audio.frame_features), jnp.float32)
    return found

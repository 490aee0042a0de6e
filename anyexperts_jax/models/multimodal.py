"""The multimodal decoder: one causal sequence of text, image, audio and video positions."""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import NUM_MODALITIES, Modality
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.models.audio import AudioEncoder
from anyexperts_jax.models.audio_tower import AudioTower
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.media import audio_media, place_rows, visual_media
from anyexperts_jax.models.placed_media import PlacedMedia
from anyexperts_jax.models.vision import VisionEncoder
from anyexperts_jax.models.vision_tower import VisionTower
from anyexperts_jax.nn.block import BlockContext
from anyexperts_jax.nn.embeddings import Embedding
from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.nn.norms import RMSNorm
from anyexperts_jax.nn.rope import rotations, rotations_in_space
from anyexperts_jax.nn.stack import Stack, StackCache
from anyexperts_jax.ops.attention import CausalMask
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.sharding.activations import split_tokens
from anyexperts_jax.sharding.attention import whole_mask
from anyexperts_jax.sharding.placement import Placement


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """Logits of the next token at every position, and what each MoE layer's router did."""

    logits_BTY: Float[Array, "B T Y"]  # float32
    trace: RoutingTrace  # stacked over the L MoE layers


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TextPart:
    """Text tokens that follow what a cache holds: the first `length_B` of each row, from position `start_B` on."""

    tokens_BT: Int[Array, "B T"]
    start_B: Int[Array, "B"]
    length_B: Int[Array, "B"]
    lead_B: Float[Array, "B"] | None = None  # by how much a token is rotated by less than its place, behind pictures


class MultimodalModel(nn.Module):
    """Text embeddings with encoded patches and frames at media positions, the stack, a norm and the output head."""

    config: ModelConfig
    placement: Placement | None = None  # of the arrays; None: on one device

    def setup(self) -> None:
        config, stack = self.config, self.config.stack
        types: dict[str, Any] = {"dtype": stack.dtype, "param_dtype": stack.param_dtype}
        # The residual stream starts at unit scale, so that a virtual expert's pass-through does not drown it; a tied
        # table also is the head, whose logits are to start at unit scale.
        std = stack.d_model**-0.5 if config.tie_embeddings else 1.0
        where: dict[str, Any] = {"placement": self.placement}
        self.tokens = Embedding(config.vocab_size, stack.d_model, "vocab", std, **types, **where)
        if config.modality_embedding:
            self.modality = Embedding(NUM_MODALITIES, stack.d_model, std=0.5 * std, **types, **where)
        if config.vision is not None:
            self.vision = VisionEncoder(config.vision, stack, **where)
        if config.audio is not None:
            self.audio = AudioEncoder(config.audio, stack)
        if config.vision_tower is not None:
            self.vision_tower = VisionTower(config.vision_tower, stack.d_model, **types, **where)
        if config.audio_tower is not None:
            self.audio_tower = AudioTower(config.audio_tower, stack.d_model, **types, **where)
        self.decoder = Stack(stack, config.moe, self.placement)
        self.final_norm = RMSNorm(stack.norm_eps, **types)
        if not config.tie_embeddings:
            self.head = Linear((config.vocab_size,), ("embed", "vocab"), out_dtype="float32", **types)

    def __call__(
        self,
        batch: Batch,
        *,
        router_bias_LC: Float[Array, "L *M C"] | None = None,
        window: Float[Array, "*layers 2"] | None = None,
        importance_logits_BT: Float[Array, "B T"] | None = None,
        placed: PlacedMedia | None = None,
    ) -> ModelOutput:
        """Teacher-forced logits.

        Args:
          batch: at most `max_length` positions, with the features of patches and frames the encoders expect.
          placed: what the towers read, and where their rows go; modalities and rotation are then its own.
          router_bias_LC: the expert biases of loss-free balancing; needed with `moe.expert_bias`, unused without.
          window: (k_min, k_max) in place of the configuration's, for every layer; [L, 2], one for each; [B, T, 2], one
            for each token; or [L, B, T, 2].
          importance_logits_BT: in place of every layer's own.

        Raises:
          UserError: when the batch's shapes do not fit the configuration.
        """
        _check_batch(self.config, batch)
        policy = {"router_bias_LC": router_bias_LC, "window": window, "importance_logits_BT": importance_logits_BT}
        return self.decode(self.embed(batch), batch, placed=placed, **policy)

    def decode(
        self,
        x_BTD: Float[Array, "B T D"],
        batch: Batch,
        *,
        router_bias_LC: Float[Array, "L *M C"] | None = None,
        window: Float[Array, "*layers 2"] | None = None,
        importance_logits_BT: Float[Array, "B T"] | None = None,
        placed: PlacedMedia | None = None,
    ) -> ModelOutput:
        """What `__call__` does after `embed`. It is apart so that gradients by the embedded sequence can be taken."""
        stack = self.config.stack
        causal = CausalMask(jnp.asarray(batch.valid_BT), jnp.asarray(batch.segment_BT))
        if stack.attention.value_dim == stack.attention.head_dim:
            mask = whole_mask(causal, stack.attention.head_dim, jnp.dtype(stack.dtype), self.placement)
        else:
            mask = causal.dense()  # kernels take values as wide as keys
        context = self._batch_context(batch, mask, window)
        context = dataclasses.replace(context, importance_logits_BT=importance_logits_BT)
        if placed is not None:
            x_BTD, context = self._with_media(x_BTD, context, placed)
        x_BTD, trace, _ = self._decode(x_BTD, context, router_bias_LC)
        return ModelOutput(self._logits(x_BTD), trace)

    def prefill(
        self,
        batch: Batch,
        cache: StackCache,
        *,
        router_bias_LC: Float[Array, "L *M C"] | None = None,
        window: Float[Array, "*layers 2"] | None = None,
        importance_logits_BT: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B Y"], RoutingTrace, StackCache]:
        """Logits after each sequence's last valid position, the trace, and the cache filled with the sequences.

        A sequence is one segment: the cache keeps none apart.
        """
        _check_batch(self.config, batch)
        valid_BT = jnp.asarray(batch.valid_BT)
        context = self._batch_context(batch, causal_mask(_row_positions(batch), cache.length), window)
        context = dataclasses.replace(context, importance_logits_BT=importance_logits_BT)
        x_BTD, trace, written = self._decode(self.embed(batch), context, router_bias_LC, cache)
        last_B = jnp.maximum(valid_BT.sum(axis=1) - 1, 0)
        return self._logits(x_BTD[jnp.arange(x_BTD.shape[0]), last_B]), trace, cast(StackCache, written)

    def step(
        self,
        tokens_B: Int[Array, "B"],
        positions_B: Int[Array, "B"],
        live_B: Bool[Array, "B"],
        cache: StackCache,
        *,
        router_bias_LC: Float[Array, "L *M C"] | None = None,
        window: Float[Array, "*layers 2"] | None = None,
    ) -> tuple[Float[Array, "B Y"], StackCache]:
        """Logits after one more text token per sequence, at its own position. Rows that are not live hold anything."""
        text = TextPart(tokens_B[:, None], positions_B, live_B.astype(jnp.int32))
        logits_BY, _, cache = self.extend(text, cache, router_bias_LC=router_bias_LC, window=window)
        return logits_BY, cache

    def extend(
        self,
        text: TextPart,
        cache: StackCache,
        *,
        router_bias_LC: Float[Array, "L *M C"] | None = None,
        window: Float[Array, "*layers 2"] | None = None,
        importance_logits_BT: Float[Array, "B T"] | None = None,
        placed: PlacedMedia | None = None,
    ) -> tuple[Float[Array, "B Y"], RoutingTrace, StackCache]:
        """Logits after the last of further text tokens, each sequence's from its own position on, and the trace.

        Args:
          cache: filled with the positions before.
          placed: as for the call, at these tokens.
          importance_logits_BT: in place of every layer's own.
        """
        length = text.tokens_BT.shape[1]
        place_1T = jnp.arange(length, dtype=jnp.int32)[None]
        positions_BT = text.start_B[:, None] + place_1T
        valid_BT = place_1T < text.length_B[:, None]
        modality_BT = jnp.full_like(positions_BT, Modality.TEXT)
        x_BTD = self._with_modality(self.tokens(text.tokens_BT), modality_BT)
        turned_BT = positions_BT.astype(jnp.float32) - (0 if text.lead_B is None else text.lead_B[:, None])
        context = BlockContext(
            positions_BT,
            valid_BT,
            causal_mask(positions_BT, cache.length),
            rotation=rotations(self.config.stack.attention, turned_BT),
            window=window,
            modality_BT=modality_BT,
            importance_logits_BT=importance_logits_BT,
        )
        if placed is not None:
            x_BTD, context = self._with_media(x_BTD, context, placed)
        x_BTD, trace, written = self._decode(x_BTD, context, router_bias_LC, cache)
        last_B = jnp.maximum(text.length_B - 1, 0)
        logits_BY = self._logits(x_BTD[jnp.arange(x_BTD.shape[0]), last_B])
        return logits_BY, trace, cast(StackCache, written)

    def embed(self, batch: Batch) -> Float[Array, "B T D"]:
        """The sequence as the first block sees it."""
        x_BTD = self.tokens(jnp.asarray(batch.tokens_BT))
        if self.config.vision is not None:
            visual_BT, patches = visual_media(batch)
            x_BTD = place_rows(x_BTD, visual_BT, self.vision(patches))
        if self.config.audio is not None:
            audio_BT, frames = audio_media(batch)
            x_BTD = place_rows(x_BTD, audio_BT, self.audio(frames))
        x_BTD = self._with_modality(x_BTD, jnp.asarray(batch.modality_BT))
        return split_tokens(x_BTD, self.placement, ("batch", "length"))

    def _with_modality(self, x_BTD: Float[Array, "B T D"], modality_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return x_BTD + self.modality(modality_BT) if self.config.modality_embedding else x_BTD

    def _with_media(
        self, x_BTD: Float[Array, "B T D"], context: BlockContext, placed: PlacedMedia
    ) -> tuple[Float[Array, "B T D"], BlockContext]:
        """The stream with the towers' rows at their places, what is added to the first layers, and their rotation."""
        modality_BT, row_BT = jnp.asarray(placed.modality_BT), jnp.asarray(placed.row_BT)
        context = dataclasses.replace(
            context,
            rotation=rotations_in_space(self.config.stack.attention, jnp.asarray(placed.rotary_BT3)),
            modality_BT=modality_BT,
        )
        heard_BT1 = ((row_BT >= 0) & (modality_BT == Modality.AUDIO))[:, :, None]
        seen_BT1 = (row_BT >= 0)[:, :, None] & ~heard_BT1
        row_BT = jnp.maximum(row_BT, 0)
        if placed.sounds is not None:
            rows_ND = self.audio_tower(placed.sounds).reshape(-1, x_BTD.shape[-1])
            x_BTD = jnp.where(heard_BT1, rows_ND[row_BT].astype(x_BTD.dtype), x_BTD)
        if placed.frames is not None:
            seen = self.vision_tower(placed.frames)
            rows_JND = jnp.concatenate([seen.rows_FRD[None], seen.deep_JFRD]).reshape(
                1 + len(seen.deep_JFRD), -1, x_BTD.shape[-1]
            )
            found_JBTD = rows_JND[:, row_BT].astype(x_BTD.dtype)
            x_BTD = jnp.where(seen_BT1, found_JBTD[0], x_BTD)
            context = dataclasses.replace(context, deep_JBTD=jnp.where(seen_BT1[None], found_JBTD[1:], 0))
        return x_BTD, context

    def _batch_context(
        self, batch: Batch, mask: Bool[Array, "B T S"] | CausalMask, window: Float[Array, "*layers 2"] | None
    ) -> BlockContext:
        """The cache is written at positions in the row; attention uses positions in the segment."""
        return BlockContext(
            positions_BT=_row_positions(batch),
            valid_BT=jnp.asarray(batch.valid_BT),
            mask=mask,
            rotation=rotations(self.config.stack.attention, jnp.asarray(batch.position_BT)),
            window=window,
            modality_BT=jnp.asarray(batch.modality_BT),
            segment_BT=jnp.asarray(batch.segment_BT),
        )

    def _decode(
        self,
        x_BTD: Float[Array, "B T D"],
        context: BlockContext,
        router_bias_LC: Float[Array, "L *M C"] | None,
        cache: StackCache | None = None,
    ) -> tuple[Float[Array, "B T D"], RoutingTrace, StackCache | None]:
        return self.decoder(x_BTD, context, router_bias_LC if self.config.moe.expert_bias else None, cache)

    def _logits(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest Y"]:
        x = self.final_norm(x)
        return self.tokens.logits(x) if self.config.tie_embeddings else self.head(x)


def _row_positions(batch: Batch) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(batch.tokens_BT.shape[1]), batch.tokens_BT.shape)


def causal_mask(positions_BT: Int[Array, "B T"], num_keys: int) -> Bool[Array, "B T S"]:
    """True where the key at position s is not after the query's position."""
    return jnp.arange(num_keys)[None, None] <= positions_BT[:, :, None]


def _check_batch(config: ModelConfig, batch: Batch) -> None:
    length = batch.tokens_BT.shape[1]
    require(length <= config.max_length, f"the batch has {length} positions, more than max_length={config.max_length}")
    _, patches, features = batch.patches_BPX.shape
    if config.vision is None:
        require(patches == 0, f"the batch has room for {patches} patches, but the model has no vision encoder")
    else:
        expected = config.vision.patch_features
        require(patches > 0, "the batch has no room for patches; set vision to none")
        require(features == expected, f"patches have {features} features, vision.patch_features={expected}")
    _, frames, features = batch.frames_BSX.shape
    if config.audio is None:
        require(frames == 0, f"the batch has room for {frames} audio frames, but the model has no audio encoder")
    else:
        expected = config.audio.frame_features
        require(frames > 0, "the batch has no room for audio frames; set audio to none")
        require(features == expected, f"audio frames have {features} features, audio.frame_features={expected}")

"""Stacked log-mel frames to embeddings."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from anyexperts_jax.models.config import AudioConfig
from anyexperts_jax.models.encoder import EncoderTail, FeatureEmbedding
from anyexperts_jax.nn.attention import rotations
from anyexperts_jax.nn.block import BlockContext
from anyexperts_jax.nn.config import StackConfig


class AudioEncoder(nn.Module):
    """Linear frames; in transformer layers, where configured, every frame of a clip sees every other, with RoPE."""

    config: AudioConfig
    stack: StackConfig

    @nn.compact
    def __call__(self, frames_BSX: Float[Array, "B S X"], used_BS: Bool[Array, "B S"]) -> Float[Array, "B S D"]:
        x_BSD = FeatureEmbedding(self.stack, name="frame")(frames_BSX)
        batch, length = used_BS.shape
        positions_BS = jnp.broadcast_to(jnp.arange(length), (batch, length))
        mask_BSS = jnp.broadcast_to(used_BS[:, None, :], (batch, length, length))
        context = BlockContext(positions_BS, used_BS, mask_BSS, rotations(self.stack.attention, positions_BS))
        return EncoderTail(self.stack, self.config.num_layers, self.config.d_ff, name="tail")(x_BSD, context)

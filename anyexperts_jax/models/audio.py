"""Stacked log-mel frames to embeddings."""

import flax.linen as nn
from jaxtyping import Array, Float

from anyexperts_jax.models.config import AudioConfig
from anyexperts_jax.models.encoder import EncoderTail, FeatureEmbedding
from anyexperts_jax.models.media import MediaBatch
from anyexperts_jax.nn.block import BlockContext
from anyexperts_jax.nn.config import StackConfig
from anyexperts_jax.nn.rope import rotations


class AudioEncoder(nn.Module):
    """A linear map of each frame, then, if configured, transformer layers in which the frames of a clip attend to each
    other, with RoPE.

    A frame does not see other clips of its sequence, and its rotation angle depends on its position in its own clip.
    """

    config: AudioConfig
    stack: StackConfig

    @nn.compact
    def __call__(self, frames: MediaBatch) -> Float[Array, "B S D"]:
        x_BSD = FeatureEmbedding(self.stack, name="frame")(frames.features_BRX)
        rotation = rotations(self.stack.attention, frames.time_BR)
        context = BlockContext(frames.time_BR, frames.used_BR, frames.same_item(), rotation)
        return EncoderTail(self.stack, self.config.num_layers, self.config.d_ff, name="tail")(x_BSD, context)

"""Image and video patches to embeddings."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.models.config import VisionConfig
from anyexperts_jax.models.encoder import EncoderTail, FeatureEmbedding
from anyexperts_jax.nn.block import BlockContext
from anyexperts_jax.nn.config import StackConfig
from anyexperts_jax.nn.embeddings import Embedding
from anyexperts_jax.sharding.placement import Placement


class VisionEncoder(nn.Module):
    """Linear patches, plus learned embeddings of the place on the frame and of the frame's time.

    Transformer layers, where configured, let a patch see its own frame's patches and no other frame's: a later frame
    never changes an earlier one.
    """

    config: VisionConfig
    stack: StackConfig
    placement: Placement | None = None  # of the arrays; None: on one device

    @nn.compact
    def __call__(
        self,
        patches_BPX: Float[Array, "B P X"],
        place_BP: Int[Array, "B P"],
        time_BP: Int[Array, "B P"],
        used_BP: Bool[Array, "B P"],
    ) -> Float[Array, "B P D"]:
        config, stack = self.config, self.stack
        types: dict[str, Any] = {"std": 0.5, "dtype": stack.dtype, "param_dtype": stack.param_dtype}
        types |= {"placement": self.placement, "id_axes": ("batch",)}
        x_BPD = FeatureEmbedding(stack, name="patch")(patches_BPX)
        x_BPD = x_BPD + Embedding(config.max_places, stack.d_model, name="place", **types)(place_BP)
        x_BPD = x_BPD + Embedding(config.max_frames, stack.d_model, name="time", **types)(time_BP)
        same_frame_BPP = time_BP[:, :, None] == time_BP[:, None, :]
        positions_BP = jnp.broadcast_to(jnp.arange(place_BP.shape[1]), place_BP.shape)
        context = BlockContext(positions_BP, used_BP, same_frame_BPP & used_BP[:, None, :])
        return EncoderTail(stack, config.num_layers, config.d_ff, name="tail")(x_BPD, context)

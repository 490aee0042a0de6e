"""Image and video patches to embeddings."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.models.config import VisionConfig
from anyexperts_jax.models.encoder import EncoderTail, FeatureEmbedding
from anyexperts_jax.models.media import MediaBatch
from anyexperts_jax.nn.block import BlockContext
from anyexperts_jax.nn.config import StackConfig
from anyexperts_jax.nn.embeddings import Embedding
from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.sharding.placement import Placement

SHORTEST_WAVE, LONGEST_WAVE = 4.0, 256.0  # patches: neighbours differ clearly, and no grid in sight wraps around
_STD = 0.5  # standard deviation, at initialisation, of what place and time each add to a patch


class VisionEncoder(nn.Module):
    """A linear map of each patch, plus learned embeddings of its place on the frame and of the frame's time.

    In the transformer layers, if configured, a patch attends to the patches of its own frame only. So a later frame
    never changes an earlier one, and the pictures and videos of a sequence do not see each other.
    """

    config: VisionConfig
    stack: StackConfig
    placement: Placement | None = None  # where the arrays lie; None: on one device

    @nn.compact
    def __call__(self, patches: MediaBatch) -> Float[Array, "B P D"]:
        config, stack = self.config, self.stack
        types: dict[str, Any] = {"dtype": stack.dtype, "param_dtype": stack.param_dtype}
        where: dict[str, Any] = {"placement": self.placement, "id_axes": ("batch",)}
        waves_BPX = place_waves(patches.grid_row_BR, patches.grid_column_BR, config.place_frequencies)
        # sin^2 + cos^2 = 1, so the squares of the features sum to half their number. Hence the factor sqrt(2).
        place = Linear((stack.d_model,), ("features", "embed"), scale=_STD * math.sqrt(2), name="place", **types)
        time = Embedding(config.max_frames, stack.d_model, std=_STD, name="time", **types, **where)
        x_BPD = FeatureEmbedding(stack, name="patch")(patches.features_BRX)
        x_BPD = x_BPD + place(waves_BPX) + time(patches.time_BR)
        context = BlockContext(patches.time_BR, patches.used_BR, patches.same_frame())
        return EncoderTail(stack, config.num_layers, config.d_ff, name="tail")(x_BPD, context)


def place_waves(
    row_BP: Int[Array, "B P"], column_BP: Int[Array, "B P"], frequencies: int
) -> Float[Array, "B P four_frequencies"]:
    """Sines and cosines of a patch's row, then of its column, in float32: its place on a grid of any size.

    The wavelengths form a geometric sequence from `SHORTEST_WAVE` to `LONGEST_WAVE` patches.
    """
    exponents = jnp.arange(frequencies, dtype=jnp.float32) / max(frequencies - 1, 1)
    per_patch = 2 * jnp.pi / SHORTEST_WAVE * (SHORTEST_WAVE / LONGEST_WAVE) ** exponents
    angles = [place_BP[:, :, None].astype(jnp.float32) * per_patch[None, None] for place_BP in (row_BP, column_BP)]
    return jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=-1)

"""The audio tower of published models: convolutions over chunks of log-mel frames, then a transformer in windows."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.initializers import Constant, FanIn
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.models.config import AudioTowerConfig
from anyexperts_jax.models.tower import TowerBlock
from anyexperts_jax.nn.config import Dtype
from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.nn.mlp import GeluMLP
from anyexperts_jax.nn.norms import LayerNorm
from anyexperts_jax.nn.params import named
from anyexperts_jax.sharding.placement import Placement

_LONGEST_WAVE = 10_000.0  # of the places in a chunk, in rows
_AT_ONCE = 8  # windows that are convolved together: what the convolutions make is much larger than the rows


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Sounds:
    """Sounds cut into windows of O chunks of S frames; a window holds chunks of one sound.

    Every window has at least one frame, also those that only fill up the array.
    """

    mel_IOSX: Float[ArrayLike, "I O S X"]  # log-mel; frames past the sound's end are zero
    frames_IO: Int[ArrayLike, "I O"]  # frames that are the sound's
    width_IO: Int[ArrayLike, "I O"]  # frames the convolutions may see: S, but in a sound that is shorter its length


class AudioTower(nn.Module):
    """Three convolutions and the place in the chunk, transformer blocks over a window, and a map to the stream."""

    config: AudioTowerConfig
    out_width: int  # D of the decoder
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    placement: Placement | None = None  # of the arrays; None: on one device

    @nn.compact
    def __call__(self, sounds: Sounds) -> Float[Array, "I R D"]:
        """R rows a window, as many for each of its chunks; those past a chunk's own are arbitrary."""
        config = self.config
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        filters = [
            Filters(config.channels, self.param_dtype, name=f"conv_{i}")(inputs)
            for i, inputs in enumerate((1, config.channels, config.channels))
        ]
        mel_IOSX = jnp.asarray(sounds.mel_IOSX, jnp.float32)
        width_IO, frames_IO = jnp.asarray(sounds.width_IO), jnp.asarray(sounds.frames_IO)

        def convolved(window: tuple[Array, Array]) -> Array:
            return _convolved(*window, filters).astype(self.dtype)

        features_IORX = jax.lax.map(convolved, (mel_IOSX, width_IO), batch_size=_AT_ONCE)
        windows, chunks, rows = features_IORX.shape[:3]
        x_IORD = Linear((config.d_model,), ("features", "embed"), name="frame", **types)(features_IORX)
        x_IORD = x_IORD + places(rows, config.d_model)[None, None].astype(x_IORD.dtype)
        x_IRD = x_IORD.reshape(windows, chunks * rows, config.d_model)
        valid_IOR = jnp.arange(rows)[None, None] * 8 < frames_IO[:, :, None]
        valid_IR = valid_IOR.reshape(windows, chunks * rows)
        mask_IRR = jnp.broadcast_to(valid_IR[:, None], (windows, chunks * rows, chunks * rows))
        for layer in range(config.num_layers):
            block = TowerBlock(config, exact=True, placement=self.placement, name=f"block_{layer}", **types)
            x_IRD = block(x_IRD, mask_IRR)
        x_IRD = LayerNorm(config.norm_eps, name="norm", **types)(x_IRD)
        return GeluMLP(config.d_model, self.out_width, exact=True, name="mlp", **types)(x_IRD)


class Filters(nn.Module):
    """The parameters of a convolution of 3 bins x 3 frames."""

    channels: int
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "inputs channels"], Float[Array, " channels"]]:
        dtype = jnp.dtype(self.param_dtype)
        kernel = self.param("kernel", named(FanIn(), ("features", "embed")), (inputs * 9, self.channels), dtype)
        bias = self.param("bias", named(Constant(0.0), ("embed",)), (self.channels,), dtype)
        return kernel, bias


def _convolved(
    mel_OSX: Float[Array, "O S X"], width_O: Int[Array, " O"], filters: list[tuple[Array, Array]]
) -> Float[Array, "O R features"]:
    """The features of each row, channel by channel, float32.

    Each convolution halves frames and bins. Past a chunk's width its results are set to zero, as if it ended there.
    """
    x = mel_OSX[..., None]
    for flat, bias in filters:
        width_O = (width_O + 1) // 2
        kernel = flat.astype(jnp.float32).reshape(-1, 3, 3, flat.shape[-1])
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NWHC", "IHWO", "NWHC")
        )
        x = jax.nn.gelu(x + bias.astype(jnp.float32)[None, None, None], approximate=False)
        inside_OS = jnp.arange(x.shape[1])[None] < width_O[:, None]
        x = jnp.where(inside_OS[:, :, None, None], x, 0)
    by_channel = x.transpose((0, 1, 3, 2))
    return by_channel.reshape(*by_channel.shape[:2], -1)


def places(rows: int, width: int) -> Float[Array, "R D"]:
    """Sines, then cosines, of each row's place in its chunk, float32."""
    half = width // 2
    per_row = jnp.exp(-math.log(_LONGEST_WAVE) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = jnp.arange(rows, dtype=jnp.float32)[:, None] * per_row[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

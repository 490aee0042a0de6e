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
    """Sounds cut into windows of A chunks of frames; a window holds chunks of one sound.

    Every window has at least one frame, also those that only fill up the array.
    """

    mel_WAFM: Float[ArrayLike, "W A F M"]  # log-mel; frames past the sound's end are zero
    frames_WA: Int[ArrayLike, "W A"]  # frames that are the sound's
    width_WA: Int[ArrayLike, "W A"]  # frames the convolutions may see: F, but in a sound that is shorter its length


class AudioTower(nn.Module):
    """Three convolutions and the place in the chunk, transformer blocks over a window, and a map to the stream."""

    config: AudioTowerConfig
    out_width: int  # D of the decoder
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    placement: Placement | None = None  # of the arrays; None: on one device

    @nn.compact
    def __call__(self, sounds: Sounds) -> Float[Array, "W N D"]:
        """N = A * R rows a window, R a chunk; those past a chunk's own are arbitrary."""
        config = self.config
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        filters = [
            Filters(config.channels, name=f"conv_{i}", **types)(inputs)
            for i, inputs in enumerate((1, config.channels, config.channels))
        ]
        mel_WAFM = jnp.asarray(sounds.mel_WAFM, jnp.float32)
        width_WA, frames_WA = jnp.asarray(sounds.width_WA), jnp.asarray(sounds.frames_WA)

        def convolved(window: tuple[Array, Array]) -> Array:
            return _convolved(*window, filters).astype(self.dtype)

        features_WARX = jax.lax.map(convolved, (mel_WAFM, width_WA), batch_size=_AT_ONCE)
        windows, chunks, rows = features_WARX.shape[:3]
        x_WARD = Linear((config.d_model,), ("features", "embed"), name="frame", **types)(features_WARX)
        x_WARD = x_WARD + places(rows, config.d_model)[None, None].astype(x_WARD.dtype)
        x_WND = x_WARD.reshape(windows, chunks * rows, config.d_model)
        valid_WAR = jnp.arange(rows)[None, None] * 8 < frames_WA[:, :, None]
        valid_WN = valid_WAR.reshape(windows, chunks * rows)
        mask_WNN = jnp.broadcast_to(valid_WN[:, None], (windows, chunks * rows, chunks * rows))
        for layer in range(config.num_layers):
            block = TowerBlock(config, exact=True, placement=self.placement, name=f"block_{layer}", **types)
            x_WND = block(x_WND, mask_WNN)
        x_WND = LayerNorm(config.norm_eps, name="norm", **types)(x_WND)
        return GeluMLP(config.d_model, self.out_width, exact=True, name="mlp", **types)(x_WND)


class Filters(nn.Module):
    """The parameters of a convolution of 3 bins x 3 frames."""

    channels: int
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "X C"], Float[Array, " C"]]:
        dtype = jnp.dtype(self.param_dtype)
        kernel_XC = self.param("kernel", named(FanIn(), ("features", "embed")), (inputs * 9, self.channels), dtype)
        bias_C = self.param("bias", named(Constant(0.0), ("embed",)), (self.channels,), dtype)
        return kernel_XC, bias_C


def _convolved(
    mel_AFM: Float[Array, "A F M"], width_A: Int[Array, " A"], filters: list[tuple[Array, Array]]
) -> Float[Array, "A R X"]:
    """The features of each row, channel by channel, float32.

    Each convolution halves frames and bins. Past a chunk's width its results are set to zero, as if it ended there.
    """
    x_AFMC = mel_AFM[..., None]
    for kernel_XC, bias_C in filters:
        width_A = (width_A + 1) // 2
        kernel = kernel_XC.astype(jnp.float32).reshape(-1, 3, 3, kernel_XC.shape[-1])
        x_AFMC = jax.lax.conv_general_dilated(
            x_AFMC, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NWHC", "IHWO", "NWHC")
        )
        x_AFMC = jax.nn.gelu(x_AFMC + bias_C.astype(jnp.float32)[None, None, None], approximate=False)
        inside_AF = jnp.arange(x_AFMC.shape[1])[None] < width_A[:, None]
        x_AFMC = jnp.where(inside_AF[:, :, None, None], x_AFMC, 0)
    by_channel = x_AFMC.transpose((0, 1, 3, 2))
    return by_channel.reshape(*by_channel.shape[:2], -1)


def places(rows: int, width: int) -> Float[Array, "R D"]:
    """Sines, then cosines, of each row's place in its chunk, float32."""
    half = width // 2
    per_row = jnp.exp(-math.log(_LONGEST_WAVE) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = jnp.arange(rows, dtype=jnp.float32)[:, None] * per_row[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

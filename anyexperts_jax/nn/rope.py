"""Rotary positions: the frequencies of the waves, and how they are stretched for sequences longer than in training."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from anyexperts_jax.nn.config import AttentionConfig, RopeScaling

Rotations = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


def rotations(config: AttentionConfig, positions_BT: Int[Array, "B T"] | Float[Array, "B T"]) -> Rotations:
    """Cosines and sines of each position's rotation angles, float32."""
    return _turned(config, positions_BT[:, :, None].astype(jnp.float32) * frequencies(config)[None, None])


def rotations_in_space(
    config: AttentionConfig, positions_BT3: Int[Array, "B T 3"] | Float[Array, "B T 3"]
) -> Rotations:
    """`rotations` where a position has a time, a row and a column, as in pictures (interleaved M-RoPE, Qwen3-VL).

    In each group of three waves, the second rotates by row and the third by column, until their numbers in
    `mrope_section` are used up. All other waves rotate by time. If time, row and column are equal, as for text, the
    result is that of `rotations`.
    """
    assert config.mrope_section is not None
    axis_of_wave = np.zeros(config.rotary_dim // 2, np.int32)
    for axis in (1, 2):
        axis_of_wave[axis : 3 * config.mrope_section[axis] : 3] = axis
    places = positions_BT3[:, :, axis_of_wave].astype(jnp.float32)
    return _turned(config, places * frequencies(config)[None, None])


def rotations_on_grid(
    row_FP: Int[Array, "F P"], column_FP: Int[Array, "F P"], head_dim: int, theta: float
) -> Rotations:
    """Rotations of the whole head width: by row in the first half of the waves and by column in the second."""
    quarter = head_dim // 4
    waves = theta ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
    angles = [place_FP[:, :, None].astype(jnp.float32) * waves[None, None] for place_FP in (row_FP, column_FP)]
    both = jnp.concatenate(angles, axis=-1)
    return jnp.cos(both), jnp.sin(both)


def rotate(x_BTHA: Float[Array, "B T H A"], rotation: Rotations, interleaved: bool = False) -> Float[Array, "B T H A"]:
    """Rotates the leading part of the head width by pairs (RoFormer); the rest passes.

    Args:
      interleaved: pairs are (2 i, 2 i + 1) in place of (i, i + half). They come out in two halves all the same: scores
        do not tell, where queries and keys are rotated alike.
    """
    cos, sin = (part[:, :, None, :] for part in rotation)
    half = cos.shape[-1]
    rest, turning = x_BTHA[..., 2 * half :], x_BTHA[..., : 2 * half].astype(cos.dtype)
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = turning[..., :half], turning[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHA.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _turned(config: AttentionConfig, angles: Float[Array, "B T half"]) -> Rotations:
    scaling = config.rope_scaling
    if scaling is None or scaling.attention_factor == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return scaling.attention_factor * jnp.cos(angles), scaling.attention_factor * jnp.sin(angles)


def frequencies(config: AttentionConfig) -> Float[Array, " half"]:
    """Radians per position for each wave, in float32, fastest first."""
    half = config.rotary_dim // 2
    plain = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    kept = _by_rotations(scaling, plain) if scaling.kind == "llama3" else _by_wave(config, scaling)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _by_rotations(scaling: RopeScaling, plain: Float[Array, " half"]) -> Float[Array, " half"]:
    """The share, 0 to 1, of each wave's plain frequency: linear in its turns over the original length (Llama 3.1)."""
    turns = scaling.original_length * plain / (2 * math.pi)
    return jnp.clip((turns - scaling.low_rotations) / (scaling.high_rotations - scaling.low_rotations), 0, 1)


def _by_wave(config: AttentionConfig, scaling: RopeScaling) -> Float[Array, " half"]:
    """The same, but linear in the wave's index (YaRN, arXiv 2309.00071)."""
    dim = config.rotary_dim

    def wave_of(rotations: float) -> float:
        wavelength = scaling.original_length / (2 * math.pi * rotations)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first, last = wave_of(scaling.high_rotations), wave_of(scaling.low_rotations)
    if scaling.whole_bounds:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001  # the two bounds coincide; the published code does the same
    return 1 - jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - first) / width, 0, 1)

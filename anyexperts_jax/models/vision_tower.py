"""The vision tower of published models: a transformer over the patches of a picture, merged to rows of the stream."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.models.config import VisionTowerConfig
from anyexperts_jax.models.tower import TowerBlock
from anyexperts_jax.nn.config import Dtype
from anyexperts_jax.nn.embeddings import Embedding
from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.nn.mlp import GeluMLP
from anyexperts_jax.nn.norms import LayerNorm
from anyexperts_jax.nn.rope import rotations_on_grid
from anyexperts_jax.sharding.placement import Placement


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Frames:
    """Pictures, and pairs of frames of videos, each padded to P patches.

    Patches are ordered by merged square: the squares go row by row over the grid, and so do the patches in each square.
    """

    patches_FPX: Float[ArrayLike, "F P X"]  # normalised pixels; rows past the frame's own are zero
    grid_F2: Int[ArrayLike, "F 2"]  # rows and columns of patches


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerOutput:
    """R rows per frame, of the decoder's width."""

    rows_FRD: Float[Array, "F R D"]
    deep_JFRD: Float[Array, "J F R D"]  # added to the stream, one after each of the decoder's first J layers


class VisionTower(nn.Module):
    """A linear map of patches with learned positions, transformer blocks with rotary positions by row and column, and
    mergers."""

    config: VisionTowerConfig
    out_width: int  # D of the decoder
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    placement: Placement | None = None  # where the arrays lie; None: on one device

    @nn.compact
    def __call__(self, frames: Frames) -> TowerOutput:
        config = self.config
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        place_FP, grid_F2 = jnp.arange(frames.patches_FPX.shape[1], dtype=jnp.int32)[None], jnp.asarray(frames.grid_F2)
        row_FP, column_FP = places_on_grid(place_FP, grid_F2, config.merge)
        valid_FP = place_FP < grid_F2.prod(axis=1)[:, None]
        patches_FPX = jnp.asarray(frames.patches_FPX).astype(self.dtype)
        x_FPD = Linear((config.d_model,), ("features", "embed"), use_bias=True, name="patch", **types)(patches_FPX)
        table = Embedding(config.side**2, config.d_model, std=0.02, name="positions", **types)
        x_FPD = x_FPD + _stretched(table, row_FP, column_FP, grid_F2, config.side).astype(x_FPD.dtype)
        length = x_FPD.shape[1]
        mask_FPP = jnp.broadcast_to(valid_FP[:, None, :], (x_FPD.shape[0], length, length))
        head_dim = config.d_model // config.num_heads
        rotation = rotations_on_grid(row_FP, column_FP, head_dim, config.rope_theta)
        deep: list[Array] = []
        for layer in range(config.num_layers):
            x_FPD = TowerBlock(config, placement=self.placement, name=f"block_{layer}", **types)(
                x_FPD, mask_FPP, rotation
            )
            if layer in config.deep_layers:
                merger = Merger(config, self.out_width, norm_after=True, name=f"deep_merger_{len(deep)}", **types)
                deep.append(merger(x_FPD))
        rows_FRD = Merger(config, self.out_width, name="merger", **types)(x_FPD)
        return TowerOutput(rows_FRD, jnp.stack(deep) if deep else jnp.zeros((0, *rows_FRD.shape), rows_FRD.dtype))


class Merger(nn.Module):
    """Maps each square of merge x merge patches to one row of the decoder's width."""

    config: VisionTowerConfig
    out_width: int
    norm_after: bool = False  # whether the norm is over the whole square instead of each patch
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x_FPD: Float[Array, "F P D"]) -> Float[Array, "F R out"]:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = LayerNorm(self.config.norm_eps, name="norm", **types)
        frames, length, width = x_FPD.shape
        square = self.config.merge**2
        squares = (frames, length // square, square * width)
        x_FRS = norm(x_FPD.reshape(squares)) if self.norm_after else norm(x_FPD).reshape(squares)
        return GeluMLP(square * width, self.out_width, exact=True, name="mlp", **types)(x_FRS)


def places_on_grid(
    place_FP: Int[Array, "#F P"], grid_F2: Int[Array, "F 2"], merge: int
) -> tuple[Int[Array, "F P"], Int[Array, "F P"]]:
    """(row, column) on the grid of each patch, which is given by its place in the order described in `Frames`."""
    inside_FP, square_FP = place_FP % merge**2, place_FP // merge**2
    squares_F1 = jnp.maximum(grid_F2[:, 1:] // merge, 1)
    row_FP = square_FP // squares_F1 * merge + inside_FP // merge
    return row_FP, square_FP % squares_F1 * merge + inside_FP % merge


def _stretched(
    table: Embedding, row_FP: Int[Array, "F P"], column_FP: Int[Array, "F P"], grid_F2: Int[Array, "F 2"], side: int
) -> Float[Array, "F P D"]:
    """The learned grid of positions, interpolated bilinearly to each frame's grid, corner to corner, in float32."""
    sums = []
    for place_FP, axis in ((row_FP, 0), (column_FP, 1)):
        last_F1 = jnp.maximum(grid_F2[:, axis, None] - 1, 1).astype(jnp.float32)
        at_FP = place_FP.astype(jnp.float32) * (side - 1) / last_F1
        first_FP = jnp.floor(at_FP)
        share_FP = at_FP - first_FP
        low_FP = first_FP.astype(jnp.int32)
        taps = [jnp.clip(low_FP + step, 0, side - 1) for step in (0, 1)]
        sums.append(list(zip(taps, (1 - share_FP, share_FP), strict=True)))
    total_FPD = jnp.float32(0)
    for row_tap_FP, row_share_FP in sums[0]:
        for column_tap_FP, column_share_FP in sums[1]:
            found_FPD = table(row_tap_FP * side + column_tap_FP).astype(jnp.float32)
            total_FPD = total_FPD + (row_share_FP * column_share_FP)[..., None] * found_FPD
    return total_FPD

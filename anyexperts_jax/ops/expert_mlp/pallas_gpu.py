"""Pallas Mosaic GPU kernels for Hopper: the six matmuls of `pallas_triton` on wgmma, fed by the tensor memory
accelerator (TMA).

A thread block owns one tile of the result and has three warpgroups: one issues the copies, two multiply, each one half
of the tile's rows. Row counts are multiples of 8 and widths of 64, the units in which TMA lays out tiles for wgmma.
They need not be multiples of the tile: beyond an array's edges TMA reads zeros and writes nothing. Tiles without live
rows store zeros, or nothing if they are never read. Dead rows of a tile with live ones are stored as zeros, so that
they add nothing to the weight gradients, which contract over rows.

bfloat16 only: wgmma multiplies float32 as TF32, and then needs both operands contiguous along the contraction, which
the weights are in one of the two directions only.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from anyexperts_jax.ops.expert_mlp import mosaic_bodies
from anyexperts_jax.ops.expert_mlp.gpu_rows import GpuRows, zero_dead_rows
from anyexperts_jax.ops.expert_mlp.gpu_tiles import MosaicTile

ROW_MULTIPLE, WIDTH_MULTIPLE = 8, 64


def gate_up(
    x_BCD: Float[Array, "B C D"],
    rows: GpuRows,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    *,
    tile: MosaicTile,
    keep: bool,
    interpret: Any,
) -> tuple[Float[Array, "B C F"], ...]:
    """(hidden,), or (hidden, gate, up) if `keep`. Dead rows are zero in tiles with live rows, undefined in others."""
    outs = (_like(x_BCD, w_gate_EDF.shape[2]),) * (3 if keep else 1)
    return _call(mosaic_bodies.gate_up_kernel, outs, tile, interpret)(*_blocks(rows), x_BCD, w_gate_EDF, w_up_EDF)


def down(
    hidden_BCF: Float[Array, "B C F"],
    rows: GpuRows,
    w_down_EFD: Float[Array, "E F D"],
    *,
    tile: MosaicTile,
    zeros: bool,
    interpret: Any,
) -> Float[Array, "B C D"]:
    """hidden w_down. Dead rows of `hidden_BCF` may hold anything; those of the result are zero if `zeros`, else
    undefined."""
    kernel = functools.partial(mosaic_bodies.down_kernel, zeros=zeros)
    out = _like(hidden_BCF, w_down_EFD.shape[2])
    (y_BCD,) = _call(kernel, (out,), tile, interpret)(*_blocks(rows), hidden_BCF, w_down_EFD)
    return y_BCD


def d_gate_up(
    d_y_BCD: Float[Array, "B C D"],
    rows: GpuRows,
    w_down_EFD: Float[Array, "E F D"],
    gate_BCF: Float[Array, "B C F"],
    up_BCF: Float[Array, "B C F"],
    *,
    tile: MosaicTile,
    interpret: Any,
) -> tuple[Float[Array, "B C F"], Float[Array, "B C F"], Float[Array, "B C F"]]:
    """(hidden, gradient of gate, gradient of up); dead rows are as in `gate_up`."""
    outs = (_like(gate_BCF, gate_BCF.shape[2]),) * 3
    call = _call(mosaic_bodies.d_gate_up_kernel, outs, tile, interpret, epilogue_tiles=2)
    return call(*_blocks(rows), d_y_BCD, w_down_EFD, gate_BCF, up_BCF)


def d_x(
    d_gate_BCF: Float[Array, "B C F"],
    d_up_BCF: Float[Array, "B C F"],
    rows: GpuRows,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    *,
    tile: MosaicTile,
    zeros: bool,
    interpret: Any,
) -> Float[Array, "B C D"]:
    """Gradient of x; dead rows are zero if `zeros`, else undefined."""
    kernel, out = functools.partial(mosaic_bodies.d_x_kernel, zeros=zeros), _like(d_gate_BCF, w_gate_EDF.shape[1])
    (d_x_BCD,) = _call(kernel, (out,), tile, interpret)(*_blocks(rows), d_gate_BCF, d_up_BCF, w_gate_EDF, w_up_EDF)
    return d_x_BCD


def d_weights(
    a_ERI: Float[Array, "_ R I"], rows: GpuRows, *b_ERJ: Float[Array, "_ R J"], tile: MosaicTile, interpret: Any
) -> tuple[Float[Array, "E I J"], ...]:
    """a^T b over the live rows of each expert, for every b; exactly zero for an expert without rows.

    Args:
      a_ERI: [E, C, I], or the rows of all experts as [1, R, I] with experts starting at multiples of `tile.k`. A step
        reads `tile.k` rows; if some of them are live, the dead ones must be zero here and in every b. The results of
        `gate_up` and `d_gate_up` are; `clean` makes other arrays so.
    """
    out = jax.ShapeDtypeStruct((rows.counts_E.shape[0], a_ERI.shape[2], b_ERJ[0].shape[2]), a_ERI.dtype)
    call = _call(mosaic_bodies.d_weights_kernel, (out,) * len(b_ERJ), tile, interpret)
    return call(rows.starts_E, rows.counts_E, a_ERI, *b_ERJ)


clean = zero_dead_rows  # a separate XLA pass: TMA copies whole tiles to shared memory and cannot mask rows


def _blocks(rows: GpuRows) -> tuple[Array, Array]:
    return rows.experts_B, rows.counts_B


def _like(rows_BCI: Array, width: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*rows_BCI.shape[:2], width), rows_BCI.dtype)


def _call(kernel: Any, outs: tuple[Any, ...], tile: MosaicTile, interpret: Any, epilogue_tiles: int = 0) -> Any:
    """The kernel over the tiles of its results. `epilogue_tiles` adds tiles of shared memory with their barriers."""
    slices, height, width = outs[0].shape
    tile_smem = plgpu.SMEM((tile.m, tile.n), outs[0].dtype, transforms=mosaic_bodies.transforms(tile.n, outs[0].dtype))
    barriers: list[Any] = (
        [plgpu.Barrier(num_arrivals=epilogue_tiles, num_barriers=mosaic_bodies.WORKERS)] if epilogue_tiles else []
    )
    body = functools.partial(kernel, tile=tile)
    body.__name__ = getattr(kernel, "func", kernel).__name__.strip("_")  # type: ignore[attr-defined]
    return plgpu.kernel(
        body,
        out_type=outs,
        # Rows vary fastest and experts slowest, so that blocks in flight together share an expert's weights in L2.
        grid=(pl.cdiv(height, tile.m), pl.cdiv(width, tile.n), slices),
        grid_names=("row", "column", "slice"),
        num_threads=mosaic_bodies.WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=[*[tile_smem] * (1 + epilogue_tiles), *barriers],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret or None,
    )

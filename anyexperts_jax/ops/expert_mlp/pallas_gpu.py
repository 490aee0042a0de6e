"""Pallas Mosaic GPU kernels for Hopper: the six matmuls of `pallas_triton`, with wgmma fed by the tensor memory
accelerator (TMA).

A block owns one tile of the result and has three warpgroups: one orders the copies, two multiply, each half the rows
of the tile. Rows are multiples of 8 and widths of 64, the unit in which TMA lays tiles out for wgmma; they need not
be multiples of the tile, for past a block's edges TMA reads zeros and writes nothing. Blocks without a live row store
zeros, or nothing where nobody reads them; dead rows of a tile that has live ones are stored as zeros, so that the
weight gradients, which contract over rows, add nothing for them.

Only bfloat16: wgmma takes float32 as TF32 and then wants both operands contiguous along the contraction, which the
weights are in one direction alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp
from anyexperts_jax.ops.expert_mlp.gpu_rows import GpuRows, zero_dead_rows
from anyexperts_jax.ops.expert_mlp.gpu_tiles import MosaicTile

ROW_MULTIPLE, WIDTH_MULTIPLE = 8, 64
_WORKERS = 2  # warpgroups that multiply; one more copies
_COPY_REGISTERS = 40  # a thread of the copying warpgroup needs few, those that multiply get the rest


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
    """(hidden,), or (hidden, gate, up) with `keep`; dead rows of tiles with a live row are zero, others undefined."""
    outs = (_like(x_BCD, w_gate_EDF.shape[2]),) * (3 if keep else 1)
    return _call(_gate_up_kernel, outs, tile, interpret)(*_blocks(rows), x_BCD, w_gate_EDF, w_up_EDF)


def down(
    hidden_BCF: Float[Array, "B C F"],
    rows: GpuRows,
    w_down_EFD: Float[Array, "E F D"],
    *,
    tile: MosaicTile,
    zeros: bool,
    interpret: Any,
) -> Float[Array, "B C D"]:
    """hidden w_down, whatever `hidden_BCF` holds in dead rows; these are zero with `zeros`, else undefined."""
    kernel = functools.partial(_down_kernel, zeros=zeros)
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
    """(hidden, gradient of gate, gradient of up); dead rows as `gate_up` leaves them."""
    outs = (_like(gate_BCF, gate_BCF.shape[2]),) * 3
    call = _call(_d_gate_up_kernel, outs, tile, interpret, epilogue_tiles=2)
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
    """Gradient of x; dead rows are zero with `zeros`, else undefined."""
    kernel, out = functools.partial(_d_x_kernel, zeros=zeros), _like(d_gate_BCF, w_gate_EDF.shape[1])
    (d_x_BCD,) = _call(kernel, (out,), tile, interpret)(*_blocks(rows), d_gate_BCF, d_up_BCF, w_gate_EDF, w_up_EDF)
    return d_x_BCD


def d_weights(
    a_ERI: Float[Array, "_ R I"], rows: GpuRows, *b_ERJ: Float[Array, "_ R J"], tile: MosaicTile, interpret: Any
) -> tuple[Float[Array, "E I J"], ...]:
    """a^T b over the live rows of each expert, for every b; exactly zero for an expert without rows.

    Args:
      a_ERI: [E, C, I], or the rows of all experts as [1, R, I], where experts begin at multiples of `tile.k`. Dead rows
        among the `tile.k` of a step that has live ones must be zero here and in every b: `clean` makes them so, and
        `gate_up` and `d_gate_up` leave them so.
    """
    out = jax.ShapeDtypeStruct((rows.counts_E.shape[0], a_ERI.shape[2], b_ERJ[0].shape[2]), a_ERI.dtype)
    call = _call(_d_weights_kernel, (out,) * len(b_ERJ), tile, interpret)
    return call(rows.starts_E, rows.counts_E, a_ERI, *b_ERJ)


clean = zero_dead_rows  # a pass of XLA's, as a tile in shared memory holds rows of both kinds


def _blocks(rows: GpuRows) -> tuple[Array, Array]:
    return rows.experts_B, rows.counts_B


def _like(rows_BCI: Array, width: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*rows_BCI.shape[:2], width), rows_BCI.dtype)


def _call(kernel: Any, outs: tuple[Any, ...], tile: MosaicTile, interpret: Any, epilogue_tiles: int = 0) -> Any:
    """The kernel over the tiles of its results; `epilogue_tiles` more tiles of shared memory, and their barriers."""
    slices, height, width = outs[0].shape
    tile_smem = plgpu.SMEM((tile.m, tile.n), outs[0].dtype, transforms=_transforms(tile.n, outs[0].dtype))
    barriers: list[Any] = [plgpu.Barrier(num_arrivals=epilogue_tiles, num_barriers=_WORKERS)] if epilogue_tiles else []
    body = functools.partial(kernel, tile=tile)
    body.__name__ = getattr(kernel, "func", kernel).__name__.strip("_")  # type: ignore[attr-defined]
    return plgpu.kernel(
        body,
        out_type=outs,
        grid=(pl.cdiv(height, tile.m), pl.cdiv(width, tile.n), slices),
        grid_names=("row", "column", "slice"),
        num_threads=_WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=[*[tile_smem] * (1 + epilogue_tiles), *barriers],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret or None,
    )


# The kernels. `m`, `n` are the first row and column of the tile in block `b`, `e` the expert, `live` the number of live
# rows.


def _gate_up_kernel(experts_ref, counts_ref, x_ref, w_gate_ref, w_up_ref, *refs, tile):  # type: ignore[no-untyped-def]
    *out_refs, out_smem = refs
    b, m, n = _position(tile)
    e, live = experts_ref[b], counts_ref[b]

    def step(_, x_smem, w_gate_smem, w_up_smem, sums):  # type: ignore[no-untyped-def]
        for total, w_smem in zip(sums, (w_gate_smem, w_up_smem), strict=True):
            plgpu.wgmma(total, x_smem.at[_half(tile)], w_smem)
        plgpu.wgmma_wait(0)
        return sums

    def finish(gate, up):  # type: ignore[no-untyped-def]
        values = (swiglu(gate, up, x_ref.dtype), gate, up)
        _store(out_refs, values[: len(out_refs)], out_smem, b, m, n, live, tile)

    @pl.when(m < live)
    def _():  # type: ignore[no-untyped-def]
        columns = pl.ds(n, tile.n)
        operands = [
            (x_ref.at[b, pl.ds(m, tile.m), :], (tile.m, tile.k), _along_second),
            (w_gate_ref.at[e, :, columns], (tile.k, tile.n), _along_first),
            (w_up_ref.at[e, :, columns], (tile.k, tile.n), _along_first),
        ]
        _multiply(step, finish, operands, pl.cdiv(x_ref.shape[2], tile.k), tile, sums=2)


def _down_kernel(  # type: ignore[no-untyped-def]
    experts_ref, counts_ref, hidden_ref, w_down_ref, y_ref, out_smem, *, tile, zeros
):
    b, m, n = _position(tile)
    e, live = experts_ref[b], counts_ref[b]

    def step(_, hidden_smem, w_smem, sums):  # type: ignore[no-untyped-def]
        plgpu.wgmma(sums[0], hidden_smem.at[_half(tile)], w_smem)
        plgpu.wgmma_wait(0)
        return sums

    def finish(y):  # type: ignore[no-untyped-def]
        _store((y_ref,), (y,), out_smem, b, m, n, live, tile)

    @pl.when(m < live)
    def _():  # type: ignore[no-untyped-def]
        operands = [
            (hidden_ref.at[b, pl.ds(m, tile.m), :], (tile.m, tile.k), _along_second),
            (w_down_ref.at[e, :, pl.ds(n, tile.n)], (tile.k, tile.n), _along_first),
        ]
        _multiply(step, finish, operands, pl.cdiv(hidden_ref.shape[2], tile.k), tile, sums=1)

    if zeros:
        _store_zeros_if(m >= live, (y_ref,), out_smem, b, m, n, tile)


def _d_gate_up_kernel(  # type: ignore[no-untyped-def]
    experts_ref, counts_ref, d_y_ref, w_down_ref, gate_ref, up_ref, *refs, tile
):
    *out_refs, out_smem, gate_smem, up_smem, barriers = refs
    b, m, n = _position(tile)
    e, live = experts_ref[b], counts_ref[b]

    def step(_, d_y_smem, w_smem, sums):  # type: ignore[no-untyped-def]
        plgpu.wgmma(sums[0], d_y_smem.at[_half(tile)], w_smem.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return sums

    def start():  # type: ignore[no-untyped-def]
        place = (b, pl.ds(m + _half(tile).start, tile.m // _WORKERS), pl.ds(n, tile.n))
        barrier = barriers.at[lax.axis_index("warpgroup")]
        for ref, smem in ((gate_ref, gate_smem), (up_ref, up_smem)):
            plgpu.copy_gmem_to_smem(ref.at[place], smem.at[_half(tile)], barrier)

    def finish(d_hidden):  # type: ignore[no-untyped-def]
        plgpu.barrier_wait(barriers.at[lax.axis_index("warpgroup")])
        values = swiglu_vjp(gate_smem[_half(tile)], up_smem[_half(tile)], d_hidden)
        _store(out_refs, values, out_smem, b, m, n, live, tile)

    @pl.when(m < live)
    def _():  # type: ignore[no-untyped-def]
        operands = [
            (d_y_ref.at[b, pl.ds(m, tile.m), :], (tile.m, tile.k), _along_second),
            (w_down_ref.at[e, pl.ds(n, tile.n), :], (tile.n, tile.k), _along_second),
        ]
        _multiply(step, finish, operands, pl.cdiv(d_y_ref.shape[2], tile.k), tile, sums=1, start=start)


def _d_x_kernel(  # type: ignore[no-untyped-def]
    experts_ref, counts_ref, d_gate_ref, d_up_ref, w_gate_ref, w_up_ref, d_x_ref, out_smem, *, tile, zeros
):
    b, m, n = _position(tile)
    e, live = experts_ref[b], counts_ref[b]

    def step(_, d_gate_smem, d_up_smem, w_gate_smem, w_up_smem, sums):  # type: ignore[no-untyped-def]
        for d_smem, w_smem in ((d_gate_smem, w_gate_smem), (d_up_smem, w_up_smem)):
            plgpu.wgmma(sums[0], d_smem.at[_half(tile)], w_smem.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return sums

    def finish(d_x):  # type: ignore[no-untyped-def]
        _store((d_x_ref,), (d_x,), out_smem, b, m, n, live, tile)

    @pl.when(m < live)
    def _():  # type: ignore[no-untyped-def]
        rows, columns = pl.ds(m, tile.m), pl.ds(n, tile.n)
        operands = [(ref.at[b, rows, :], (tile.m, tile.k), _along_second) for ref in (d_gate_ref, d_up_ref)]
        operands += [(ref.at[e, columns, :], (tile.n, tile.k), _along_second) for ref in (w_gate_ref, w_up_ref)]
        _multiply(step, finish, operands, pl.cdiv(d_gate_ref.shape[2], tile.k), tile, sums=1)

    if zeros:
        _store_zeros_if(m >= live, (d_x_ref,), out_smem, b, m, n, tile)


def _d_weights_kernel(starts_ref, counts_ref, a_ref, *refs, tile):  # type: ignore[no-untyped-def]
    *refs, out_smem = refs
    b_refs, out_refs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    e, m, n = _position(tile)
    b, start, live = (e if a_ref.shape[0] > 1 else 0), starts_ref[e] // tile.k, counts_ref[e]

    def step(_, a_smem, *b_smem_and_sums):  # type: ignore[no-untyped-def]
        *b_smems, sums = b_smem_and_sums
        for total, b_smem in zip(sums, b_smems, strict=True):
            plgpu.wgmma(total, a_smem.at[:, _half(tile)].transpose((1, 0)), b_smem)
        plgpu.wgmma_wait(0)
        return sums

    def finish(*values):  # type: ignore[no-untyped-def]
        _store(out_refs, values, out_smem, e, m, n, None, tile)

    def own_rows(k):  # type: ignore[no-untyped-def]
        return start + k, 0

    @pl.when(live > 0)
    def _():  # type: ignore[no-untyped-def]
        operands = [(a_ref.at[b, :, pl.ds(m, tile.m)], (tile.k, tile.m), own_rows)]
        operands += [(ref.at[b, :, pl.ds(n, tile.n)], (tile.k, tile.n), own_rows) for ref in b_refs]
        _multiply(step, finish, operands, pl.cdiv(live, tile.k), tile, sums=len(b_refs))

    _store_zeros_if(live == 0, out_refs, out_smem, e, m, n, tile)


def _position(tile: MosaicTile) -> tuple[Array, Array, Array]:
    """(slice of the result, first row, first column) of this block of threads."""
    return lax.axis_index("slice"), lax.axis_index("row") * tile.m, lax.axis_index("column") * tile.n


def _half(tile: MosaicTile) -> Any:
    """The rows of the tile that this warpgroup multiplies."""
    rows = tile.m // _WORKERS
    return pl.ds(lax.axis_index("warpgroup") * rows, rows)


def _multiply(
    step: Callable[..., Any],
    finish: Callable[..., None],
    operands: list[Any],
    steps: Any,
    tile: MosaicTile,
    *,
    sums: int,
    start: Callable[[], None] | None = None,
) -> None:
    """Runs `step(indices, *tiles, sums)` over the contraction, then `finish(*sums)` in float32.

    Args:
      operands: (reference, shape of a tile, which of the two axes is walked along) each.
      start: what the multiplying warpgroups do first.
    """

    def compute(run_pipeline: Callable[..., Any]) -> None:
        if start is not None:
            start()

        def scope(*totals: Any) -> None:
            run_pipeline(totals)
            finish(*(total[...] for total in totals))

        pl.run_scoped(scope, *(plgpu.ACC((tile.m // _WORKERS, tile.n), jnp.float32),) * sums)

    specs = [
        plgpu.BlockSpec(shape, walk, transforms=_transforms(shape[1], ref.dtype), memory_space=plgpu.SMEM)
        for ref, shape, walk in operands
    ]
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=_COPY_REGISTERS,
        in_specs=specs,
        wg_axis="warpgroup",
        num_compute_wgs=_WORKERS,
        max_concurrent_steps=tile.stages,
        compute_context=compute,
    )(*(ref for ref, _, _ in operands))


def _along_first(k: Array) -> tuple[Array, int]:
    return k, 0


def _along_second(k: Array) -> tuple[int, Array]:
    return 0, k


def _store(
    refs: Any, values: Any, out_smem: Any, at: Any, m: Array, n: Array, live: Array | None, tile: MosaicTile
) -> None:
    """Writes this warpgroup's rows of the tile into slice `at`, one result after the other through the same shared
    memory; zeros at and past `live`."""
    rows = tile.m // _WORKERS
    first = m + _half(tile).start
    for ref, value in zip(refs, values, strict=True):
        if live is not None:
            below = first + plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=plgpu.Layout.WGMMA) < live
            value = jnp.where(below, value, 0)
        out_smem[_half(tile)] = value.astype(ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[_half(tile)], ref.at[at, pl.ds(first, rows), pl.ds(n, tile.n)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store_zeros_if(wanted: Array, refs: Any, out_smem: Any, at: Any, m: Array, n: Array, tile: MosaicTile) -> None:
    @pl.when(wanted & (lax.axis_index("warpgroup") < _WORKERS))
    def _() -> None:
        zeros = jnp.zeros((tile.m // _WORKERS, tile.n), jnp.float32)
        _store(refs, (zeros,) * len(refs), out_smem, at, m, n, None, tile)


def _transforms(width: int, dtype: Any) -> tuple[Any, ...]:
    """The layout in shared memory that wgmma reads and TMA writes, for tiles with rows of `width`."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    classes: Any = plgpu  # whose stubs leave these two abstract
    return classes.TilingTransform((8, swizzle // itemsize)), classes.SwizzleTransform(swizzle)

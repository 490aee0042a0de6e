"""The bodies of the Mosaic GPU kernels in `pallas_gpu`: what three warpgroups do for one tile of the result."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp
from anyexperts_jax.ops.expert_mlp.gpu_tiles import MosaicTile

WORKERS = 2  # warpgroups that multiply; a third one copies
_COPY_REGISTERS = 40  # per thread of the copying warpgroup; the accumulators of the others need the rest

# The kernels. `m`, `n` are the first row and column of the tile in block `b`, `e` the expert, `live` the number of live
# rows. Each step ends with `wgmma_wait(0)`: wgmma is asynchronous, and once a step returns, the pipeline copies new
# operands over those in shared memory.


def gate_up_kernel(experts_ref, counts_ref, x_ref, w_gate_ref, w_up_ref, *refs, tile):  # type: ignore[no-untyped-def]
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


def down_kernel(  # type: ignore[no-untyped-def]
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


def d_gate_up_kernel(  # type: ignore[no-untyped-def]
    experts_ref, counts_ref, d_y_ref, w_down_ref, gate_ref, up_ref, *refs, tile
):
    *out_refs, out_smem, gate_smem, up_smem, barriers = refs
    b, m, n = _position(tile)
    e, live = experts_ref[b], counts_ref[b]

    def step(_, d_y_smem, w_smem, sums):  # type: ignore[no-untyped-def]
        # The weights are [F, D] and the contraction is over D: wgmma can read a bfloat16 tile transposed, without a
        # copy.
        plgpu.wgmma(sums[0], d_y_smem.at[_half(tile)], w_smem.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return sums

    # gate and up are needed after the contraction only. Their copies start before it, so that it hides them.
    def start():  # type: ignore[no-untyped-def]
        place = (b, pl.ds(m + _half(tile).start, tile.m // WORKERS), pl.ds(n, tile.n))
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


def d_x_kernel(  # type: ignore[no-untyped-def]
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


def d_weights_kernel(starts_ref, counts_ref, a_ref, *refs, tile):  # type: ignore[no-untyped-def]
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

    # Rows are addressed in units of tile.k, so an expert must start at a multiple of it.
    def own_rows(k):  # type: ignore[no-untyped-def]
        return start + k, 0

    @pl.when(live > 0)
    def _():  # type: ignore[no-untyped-def]
        operands = [(a_ref.at[b, :, pl.ds(m, tile.m)], (tile.k, tile.m), own_rows)]
        operands += [(ref.at[b, :, pl.ds(n, tile.n)], (tile.k, tile.n), own_rows) for ref in b_refs]
        _multiply(step, finish, operands, pl.cdiv(live, tile.k), tile, sums=len(b_refs))

    # An expert without rows has no step that would write its gradient, and the optimizer reads it.
    _store_zeros_if(live == 0, out_refs, out_smem, e, m, n, tile)


def _position(tile: MosaicTile) -> tuple[Array, Array, Array]:
    """(slice of the result, first row, first column) of this thread block's tile."""
    return lax.axis_index("slice"), lax.axis_index("row") * tile.m, lax.axis_index("column") * tile.n


def _half(tile: MosaicTile) -> Any:
    """The rows of the tile that this warpgroup multiplies."""
    rows = tile.m // WORKERS
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
    """Runs `step(indices, *tiles, sums)` along the contraction, then `finish(*sums)` with the float32 sums.

    Args:
      operands: for each: (reference, shape of a tile, index map from the step to the tile).
      start: called first by the multiplying warpgroups.
    """

    def compute(run_pipeline: Callable[..., Any]) -> None:
        if start is not None:
            start()

        def scope(*totals: Any) -> None:
            run_pipeline(totals)
            finish(*(total[...] for total in totals))

        pl.run_scoped(scope, *(plgpu.ACC((tile.m // WORKERS, tile.n), jnp.float32),) * sums)

    specs = [
        plgpu.BlockSpec(shape, walk, transforms=transforms(shape[1], ref.dtype), memory_space=plgpu.SMEM)
        for ref, shape, walk in operands
    ]
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=_COPY_REGISTERS,
        in_specs=specs,
        wg_axis="warpgroup",
        num_compute_wgs=WORKERS,
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
    """Writes this warpgroup's rows of the tile to slice `at`, with zeros from row `live` on.

    All results go through the same tile of shared memory, one after the other.
    """
    rows = tile.m // WORKERS
    first = m + _half(tile).start
    for ref, value in zip(refs, values, strict=True):
        if live is not None:
            below = first + plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=plgpu.Layout.WGMMA) < live
            value = jnp.where(below, value, 0)
        out_smem[_half(tile)] = value.astype(ref.dtype)
        plgpu.commit_smem()  # makes the writes visible to TMA, which does not see ordinary stores by itself
        plgpu.copy_smem_to_gmem(out_smem.at[_half(tile)], ref.at[at, pl.ds(first, rows), pl.ds(n, tile.n)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until TMA has read the tile: the next result overwrites it


def _store_zeros_if(wanted: Array, refs: Any, out_smem: Any, at: Any, m: Array, n: Array, tile: MosaicTile) -> None:
    @pl.when(wanted & (lax.axis_index("warpgroup") < WORKERS))
    def _() -> None:
        zeros = jnp.zeros((tile.m // WORKERS, tile.n), jnp.float32)
        _store(refs, (zeros,) * len(refs), out_smem, at, m, n, None, tile)


def transforms(width: int, dtype: Any) -> tuple[Any, ...]:
    """The swizzled layout in shared memory that TMA writes and wgmma reads, for tiles with rows of `width`."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    classes: Any = plgpu  # its type stubs declare these two classes abstract
    return classes.TilingTransform((8, swizzle // itemsize)), classes.SwizzleTransform(swizzle)

"""Pallas Mosaic GPU kernels for Hopper: the six matmuls of `pallas_triton`, with wgmma fed by the tensor memory
accelerator (TMA).

A block owns one tile of the result and has three warpgroups: one orders the copies, two multiply, each half the rows
of the tile. Rows are multiples of 8 and widths of 64, the unit in which TMA lays tiles out for wgmma; they need not
be multiples of the tile, for past an array's edges TMA reads zeros and writes nothing. Blocks without a live row store
zeros, or nothing where nobody reads them; dead rows of a tile that has live ones are stored as zeros, so that the
weight gradients, which contract over rows, add nothing for them.

Only bfloat16: wgmma takes float32 as TF32 and then wants both operands contiguous along the contraction, which the
weights are in one direction alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp
from anyexperts_jax.ops.expert_mlp.gpu_tiles import Tiles

ROW_MULTIPLE, WIDTH_MULTIPLE = 8, 64
_WORKERS = 2  # warpgroups that multiply; one more copies
_COPY_REGISTERS = 40  # a thread of the copying warpgroup needs few, those that multiply get the rest


class Tile(NamedTuple):
    """How one kernel cuts its matmul [m, k] x [k, n]: m a multiple of 128, n and k of 64."""

    m: int
    n: int
    k: int
    stages: int  # steps in flight, each with its tiles in shared memory


# As many stages as fit in the 227 KiB of shared memory beside the tiles of the epilogue.
TILES = Tiles(
    gate_up=Tile(m=128, n=128, k=64, stages=4),
    down=Tile(m=128, n=128, k=64, stages=5),
    d_gate_up=Tile(m=128, n=128, k=64, stages=4),
    d_x=Tile(m=128, n=128, k=64, stages=3),
    d_w_gate_up=Tile(m=128, n=128, k=64, stages=4),
    d_w_down=Tile(m=128, n=128, k=64, stages=5),
)


def gate_up(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    *,
    tile: Tile,
    keep: bool,
    interpret: Any,
) -> tuple[Float[Array, "E C F"], ...]:
    """(hidden,), or (hidden, gate, up) with `keep`; rows of tiles without a live row undefined."""
    experts, capacity, _ = x_ECD.shape
    out = (experts, capacity, w_gate_EDF.shape[2])
    outs = 3 if keep else 1
    return _call(_gate_up_kernel, x_ECD.dtype, (out,) * outs, tile, interpret)(counts_E, x_ECD, w_gate_EDF, w_up_EDF)


def down(
    hidden_ECF: Float[Array, "E C F"],
    counts_E: Int[Array, "E"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    tile: Tile,
    interpret: Any,
) -> Float[Array, "E C D"]:
    """hidden w_down; dead rows zero, whatever `hidden_ECF` holds there."""
    experts, capacity, _ = hidden_ECF.shape
    out = (experts, capacity, w_down_EFD.shape[2])
    (y_ECD,) = _call(_down_kernel, hidden_ECF.dtype, (out,), tile, interpret)(counts_E, hidden_ECF, w_down_EFD)
    return y_ECD


def d_gate_up(
    d_y_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_down_EFD: Float[Array, "E F D"],
    gate_ECF: Float[Array, "E C F"],
    up_ECF: Float[Array, "E C F"],
    *,
    tile: Tile,
    interpret: Any,
) -> tuple[Float[Array, "E C F"], Float[Array, "E C F"], Float[Array, "E C F"]]:
    """(hidden, gradient of gate, gradient of up); rows of tiles without a live row undefined."""
    call = _call(_d_gate_up_kernel, gate_ECF.dtype, (gate_ECF.shape,) * 3, tile, interpret, epilogue_tiles=2)
    return call(counts_E, d_y_ECD, w_down_EFD, gate_ECF, up_ECF)


def d_x(
    d_gate_ECF: Float[Array, "E C F"],
    d_up_ECF: Float[Array, "E C F"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    *,
    tile: Tile,
    interpret: Any,
) -> Float[Array, "E C D"]:
    """Gradient of x; dead rows zero."""
    experts, capacity, _ = d_gate_ECF.shape
    out = (experts, capacity, w_gate_EDF.shape[1])
    call = _call(_d_x_kernel, d_gate_ECF.dtype, (out,), tile, interpret)
    (d_x_ECD,) = call(counts_E, d_gate_ECF, d_up_ECF, w_gate_EDF, w_up_EDF)
    return d_x_ECD


def d_weights(
    a_ECI: Float[Array, "E C I"], counts_E: Int[Array, "E"], *b_ECJ: Float[Array, "E C J"], tile: Tile, interpret: Any
) -> tuple[Float[Array, "E I J"], ...]:
    """a^T b over the live rows of each expert, for every b; exactly zero for an expert without rows.

    Dead rows are zeroed in a pass of XLA's before: a tile in shared memory holds rows of both kinds.
    """
    experts, capacity, height = a_ECI.shape
    live_EC1 = (jnp.arange(capacity) < counts_E[:, None])[..., None]
    a_ECI, *b_ECJ = (jnp.where(live_EC1, each, 0) for each in (a_ECI, *b_ECJ))  # type: ignore[assignment]
    out = (experts, height, b_ECJ[0].shape[2])
    return _call(_d_weights_kernel, a_ECI.dtype, (out,) * len(b_ECJ), tile, interpret)(counts_E, a_ECI, *b_ECJ)


def _call(
    kernel: Any, dtype: Any, outs: tuple[tuple[int, ...], ...], tile: Tile, interpret: Any, epilogue_tiles: int = 0
) -> Any:
    """The kernel over the tiles of its results; `epilogue_tiles` more tiles of shared memory, and their barriers."""
    experts, height, width = outs[0]
    tile_smem = plgpu.SMEM((tile.m, tile.n), dtype, transforms=_transforms(tile.n, dtype))
    barriers: list[Any] = [plgpu.Barrier(num_arrivals=epilogue_tiles, num_barriers=_WORKERS)] if epilogue_tiles else []
    body = functools.partial(kernel, tile=tile)
    body.__name__ = kernel.__name__.strip("_")  # type: ignore[attr-defined]
    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(out, dtype) for out in outs),
        grid=(pl.cdiv(height, tile.m), pl.cdiv(width, tile.n), experts),
        grid_names=("row", "column", "expert"),
        num_threads=_WORKERS + 1,
        thread_name="warpgroup",
        scratch_types=[*[tile_smem] * (1 + epilogue_tiles), *barriers],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret or None,
    )


# The kernels. `m`, `n` are the first row and column of the block's tile, `live` the number of the expert's live rows.


def _gate_up_kernel(counts_ref, x_ref, w_gate_ref, w_up_ref, *refs, tile):  # type: ignore[no-untyped-def]
    *out_refs, out_smem = refs
    expert, m, n, live = _position(counts_ref, x_ref, tile)

    def step(_, x_smem, w_gate_smem, w_up_smem, sums):  # type: ignore[no-untyped-def]
        for total, w_smem in zip(sums, (w_gate_smem, w_up_smem), strict=True):
            plgpu.wgmma(total, x_smem.at[_half(tile)], w_smem)
        plgpu.wgmma_wait(0)
        return sums

    def finish(gate, up):  # type: ignore[no-untyped-def]
        values = (swiglu(gate, up, x_ref.dtype), gate, up)
        _store(out_refs, values[: len(out_refs)], out_smem, expert, m, n, live, tile)

    @pl.when(m < live)
    def _():  # type: ignore[no-untyped-def]
        columns = pl.ds(n, tile.n)
        operands = [
            (x_ref.at[expert, pl.ds(m, tile.m), :], (tile.m, tile.k), _along_second),
            (w_gate_ref.at[expert, :, columns], (tile.k, tile.n), _along_first),
            (w_up_ref.at[expert, :, columns], (tile.k, tile.n), _along_first),
        ]
        _multiply(step, finish, operands, pl.cdiv(x_ref.shape[2], tile.k), tile, sums=2)


def _down_kernel(counts_ref, hidden_ref, w_down_ref, y_ref, out_smem, *, tile):  # type: ignore[no-untyped-def]
    expert, m, n, live = _position(counts_ref, hidden_ref, tile)

    def step(_, hidden_smem, w_smem, sums):  # type: ignore[no-untyped-def]
        plgpu.wgmma(sums[0], hidden_smem.at[_half(tile)], w_smem)
        plgpu.wgmma_wait(0)
        return sums

    def finish(y):  # type: ignore[no-untyped-def]
        _store((y_ref,), (y,), out_smem, expert, m, n, live, tile)

    @pl.when(m < live)
    def _():  # type: ignore[no-untyped-def]
        operands = [
            (hidden_ref.at[expert, pl.ds(m, tile.m), :], (tile.m, tile.k), _along_second),
            (w_down_ref.at[expert, :, pl.ds(n, tile.n)], (tile.k, tile.n), _along_first),
        ]
        _multiply(step, finish, operands, pl.cdiv(hidden_ref.shape[2], tile.k), tile, sums=1)

    _store_zeros_if(m >= live, (y_ref,), out_smem, expert, m, n, tile)


def _d_gate_up_kernel(  # type: ignore[no-untyped-def]
    counts_ref, d_y_ref, w_down_ref, gate_ref, up_ref, *refs, tile
):
    *out_refs, out_smem, gate_smem, up_smem, barriers = refs
    expert, m, n, live = _position(counts_ref, d_y_ref, tile)

    def step(_, d_y_smem, w_smem, sums):  # type: ignore[no-untyped-def]
        plgpu.wgmma(sums[0], d_y_smem.at[_half(tile)], w_smem.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return sums

    def start():  # type: ignore[no-untyped-def]
        place = (expert, pl.ds(m + _half(tile).start, tile.m // _WORKERS), pl.ds(n, tile.n))
        barrier = barriers.at[lax.axis_index("warpgroup")]
        for ref, smem in ((gate_ref, gate_smem), (up_ref, up_smem)):
            plgpu.copy_gmem_to_smem(ref.at[place], smem.at[_half(tile)], barrier)

    def finish(d_hidden):  # type: ignore[no-untyped-def]
        plgpu.barrier_wait(barriers.at[lax.axis_index("warpgroup")])
        values = swiglu_vjp(gate_smem[_half(tile)], up_smem[_half(tile)], d_hidden)
        _store(out_refs, values, out_smem, expert, m, n, live, tile)

    @pl.when(m < live)
    def _():  # type: ignore[no-untyped-def]
        operands = [
            (d_y_ref.at[expert, pl.ds(m, tile.m), :], (tile.m, tile.k), _along_second),
            (w_down_ref.at[expert, pl.ds(n, tile.n), :], (tile.n, tile.k), _along_second),
        ]
        _multiply(step, finish, operands, pl.cdiv(d_y_ref.shape[2], tile.k), tile, sums=1, start=start)


def _d_x_kernel(  # type: ignore[no-untyped-def]
    counts_ref, d_gate_ref, d_up_ref, w_gate_ref, w_up_ref, d_x_ref, out_smem, *, tile
):
    expert, m, n, live = _position(counts_ref, d_gate_ref, tile)

    def step(_, d_gate_smem, d_up_smem, w_gate_smem, w_up_smem, sums):  # type: ignore[no-untyped-def]
        for d_smem, w_smem in ((d_gate_smem, w_gate_smem), (d_up_smem, w_up_smem)):
            plgpu.wgmma(sums[0], d_smem.at[_half(tile)], w_smem.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return sums

    def finish(d_x):  # type: ignore[no-untyped-def]
        _store((d_x_ref,), (d_x,), out_smem, expert, m, n, live, tile)

    @pl.when(m < live)
    def _():  # type: ignore[no-untyped-def]
        rows, columns = pl.ds(m, tile.m), pl.ds(n, tile.n)
        operands = [(ref.at[expert, rows, :], (tile.m, tile.k), _along_second) for ref in (d_gate_ref, d_up_ref)]
        operands += [(ref.at[expert, columns, :], (tile.n, tile.k), _along_second) for ref in (w_gate_ref, w_up_ref)]
        _multiply(step, finish, operands, pl.cdiv(d_gate_ref.shape[2], tile.k), tile, sums=1)

    _store_zeros_if(m >= live, (d_x_ref,), out_smem, expert, m, n, tile)


def _d_weights_kernel(counts_ref, a_ref, *refs, tile):  # type: ignore[no-untyped-def]
    *refs, out_smem = refs
    b_refs, out_refs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    expert, m, n, live = _position(counts_ref, a_ref, tile)

    def step(_, a_smem, *b_smem_and_sums):  # type: ignore[no-untyped-def]
        *b_smems, sums = b_smem_and_sums
        for total, b_smem in zip(sums, b_smems, strict=True):
            plgpu.wgmma(total, a_smem.at[:, _half(tile)].transpose((1, 0)), b_smem)
        plgpu.wgmma_wait(0)
        return sums

    def finish(*values):  # type: ignore[no-untyped-def]
        _store(out_refs, values, out_smem, expert, m, n, None, tile)

    @pl.when(live > 0)
    def _():  # type: ignore[no-untyped-def]
        operands = [(a_ref.at[expert, :, pl.ds(m, tile.m)], (tile.k, tile.m), _along_first)]
        operands += [(ref.at[expert, :, pl.ds(n, tile.n)], (tile.k, tile.n), _along_first) for ref in b_refs]
        _multiply(step, finish, operands, pl.cdiv(live, tile.k), tile, sums=len(b_refs))

    _store_zeros_if(live == 0, out_refs, out_smem, expert, m, n, tile)


def _position(counts_ref: Any, rows_ref: Any, tile: Tile) -> tuple[Array, Array, Array, Array]:
    """(expert, first row, first column, live rows of the expert) of this block."""
    expert = lax.axis_index("expert")
    live = jnp.minimum(counts_ref[expert], rows_ref.shape[1])
    return expert, lax.axis_index("row") * tile.m, lax.axis_index("column") * tile.n, live


def _half(tile: Tile) -> Any:
    """The rows of the tile that this warpgroup multiplies."""
    rows = tile.m // _WORKERS
    return pl.ds(lax.axis_index("warpgroup") * rows, rows)


def _multiply(
    step: Callable[..., Any],
    finish: Callable[..., None],
    operands: list[Any],
    steps: Any,
    tile: Tile,
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
    refs: Any, values: Any, out_smem: Any, expert: Array, m: Array, n: Array, live: Array | None, tile: Tile
) -> None:
    """Writes this warpgroup's rows of the tile, one result after the other through the same shared memory; zeros at
    and past `live`."""
    rows = tile.m // _WORKERS
    first = m + _half(tile).start
    for ref, value in zip(refs, values, strict=True):
        if live is not None:
            below = first + plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=plgpu.Layout.WGMMA) < live
            value = jnp.where(below, value, 0)
        out_smem[_half(tile)] = value.astype(ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[_half(tile)], ref.at[expert, pl.ds(first, rows), pl.ds(n, tile.n)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store_zeros_if(wanted: Array, refs: Any, out_smem: Any, expert: Array, m: Array, n: Array, tile: Tile) -> None:
    @pl.when(wanted & (lax.axis_index("warpgroup") < _WORKERS))
    def _() -> None:
        zeros = jnp.zeros((tile.m // _WORKERS, tile.n), jnp.float32)
        _store(refs, (zeros,) * len(refs), out_smem, expert, m, n, None, tile)


def _transforms(width: int, dtype: Any) -> tuple[Any, ...]:
    """The layout in shared memory that wgmma reads and TMA writes, for tiles with rows of `width`."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    classes: Any = plgpu  # whose stubs leave these two abstract
    return classes.TilingTransform((8, swizzle // itemsize)), classes.SwizzleTransform(swizzle)

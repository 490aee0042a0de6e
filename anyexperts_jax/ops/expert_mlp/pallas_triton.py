"""Pallas Triton kernels: six matmuls over the live rows of each expert, accumulated in float32.

    gate_up        silu(x w_gate) * (x w_up), and the two products themselves where a gradient will ask for them
    down           hidden w_down
    d_gate_up      d_y w_down^T, carried through the activation: hidden, d_gate, d_up
    d_x            d_gate w_gate^T + d_up w_up^T
    d_w_gate_up    x^T d_gate and x^T d_up in one pass over x
    d_w_down       hidden^T d_y

A program owns one tile of the result. A tile without a live row runs no step of its loop, so it costs a store of
zeros, or nothing where nobody reads it: buffers between two kernels hold garbage in dead rows, and every kernel masks
the rows it loads. Experts are the slowest axis of the grid and rows the fastest, so that programs which run together
share an expert's weights in L2.

float32 operands are multiplied as TF32, which is also what XLA's own dots do on these GPUs by default.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops._gpu import is_hopper
from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp
from anyexperts_jax.ops.expert_mlp.gpu_tiles import Tiles


class Tile(NamedTuple):
    """How one kernel cuts its matmul [m, k] x [k, n]; powers of two, 16 or more."""

    m: int
    n: int
    k: int
    warps: int
    stages: int  # tiles of both operands in flight, each in shared memory


# No spills and tensor cores at the shapes of `aot/gpu_kernels.py`, by tests/aot/gpu_test.py (static). Shared memory is
# what `stages` is limited by: 227 KiB of a Hopper, 99 KiB of the smallest GPU since Ampere.
HOPPER_16_BIT = Tiles(
    gate_up=Tile(m=128, n=128, k=64, warps=8, stages=3),
    down=Tile(m=128, n=128, k=64, warps=8, stages=4),
    d_gate_up=Tile(m=128, n=64, k=64, warps=8, stages=4),
    d_x=Tile(m=128, n=128, k=64, warps=8, stages=3),
    d_w_gate_up=Tile(m=128, n=128, k=64, warps=8, stages=3),
    d_w_down=Tile(m=128, n=128, k=64, warps=8, stages=4),
)
HOPPER_32_BIT = Tiles(
    gate_up=Tile(m=128, n=64, k=32, warps=8, stages=4),
    down=Tile(m=128, n=128, k=32, warps=8, stages=4),
    d_gate_up=Tile(m=128, n=64, k=32, warps=8, stages=4),
    d_x=Tile(m=128, n=128, k=32, warps=8, stages=3),
    d_w_gate_up=Tile(m=128, n=64, k=32, warps=8, stages=4),
    d_w_down=Tile(m=128, n=128, k=32, warps=8, stages=4),
)
OTHER_16_BIT = Tiles(
    gate_up=Tile(m=128, n=64, k=32, warps=8, stages=4),
    down=Tile(m=128, n=128, k=32, warps=8, stages=4),
    d_gate_up=Tile(m=128, n=64, k=32, warps=8, stages=4),
    d_x=Tile(m=128, n=128, k=32, warps=8, stages=3),
    d_w_gate_up=Tile(m=128, n=64, k=32, warps=8, stages=4),
    d_w_down=Tile(m=128, n=128, k=32, warps=8, stages=4),
)
OTHER_32_BIT = Tiles(*(tile._replace(k=16) for tile in OTHER_16_BIT))


def default_tiles(dtype: jnp.dtype, gpu: str | None) -> Tiles:
    """The tiles for operands of `dtype` on a GPU of that device kind."""
    if is_hopper(gpu):
        return HOPPER_16_BIT if jnp.dtype(dtype).itemsize == 2 else HOPPER_32_BIT
    return OTHER_16_BIT if jnp.dtype(dtype).itemsize == 2 else OTHER_32_BIT


def gate_up(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    *,
    tile: Tile,
    keep: bool,
    interpret: bool,
) -> tuple[Float[Array, "E C F"], ...]:
    """(hidden,), or (hidden, gate, up) with `keep`; dead rows undefined."""
    experts, capacity, _ = x_ECD.shape
    width = w_gate_EDF.shape[2]
    out = jax.ShapeDtypeStruct((experts, capacity, width), x_ECD.dtype)
    grid = (pl.cdiv(capacity, tile.m), pl.cdiv(width, tile.n), experts)
    call = _call(_gate_up_kernel, grid, (out,) * (3 if keep else 1), tile, interpret)
    return call(counts_E, x_ECD, w_gate_EDF, w_up_EDF)


def down(
    hidden_ECF: Float[Array, "E C F"],
    counts_E: Int[Array, "E"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    tile: Tile,
    interpret: bool,
) -> Float[Array, "E C D"]:
    """hidden w_down; dead rows zero, whatever `hidden_ECF` holds there."""
    experts, capacity, _ = hidden_ECF.shape
    width = w_down_EFD.shape[2]
    out = jax.ShapeDtypeStruct((experts, capacity, width), hidden_ECF.dtype)
    grid = (pl.cdiv(capacity, tile.m), pl.cdiv(width, tile.n), experts)
    (y_ECD,) = _call(_down_kernel, grid, (out,), tile, interpret)(counts_E, hidden_ECF, w_down_EFD)
    return y_ECD


def d_gate_up(
    d_y_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_down_EFD: Float[Array, "E F D"],
    gate_ECF: Float[Array, "E C F"],
    up_ECF: Float[Array, "E C F"],
    *,
    tile: Tile,
    interpret: bool,
) -> tuple[Float[Array, "E C F"], Float[Array, "E C F"], Float[Array, "E C F"]]:
    """(hidden, gradient of gate, gradient of up); dead rows undefined."""
    experts, capacity, width = gate_ECF.shape
    out = jax.ShapeDtypeStruct(gate_ECF.shape, gate_ECF.dtype)
    grid = (pl.cdiv(capacity, tile.m), pl.cdiv(width, tile.n), experts)
    return _call(_d_gate_up_kernel, grid, (out,) * 3, tile, interpret)(counts_E, d_y_ECD, w_down_EFD, gate_ECF, up_ECF)


def d_x(
    d_gate_ECF: Float[Array, "E C F"],
    d_up_ECF: Float[Array, "E C F"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    *,
    tile: Tile,
    interpret: bool,
) -> Float[Array, "E C D"]:
    """Gradient of x; dead rows zero."""
    experts, capacity, _ = d_gate_ECF.shape
    width = w_gate_EDF.shape[1]
    out = jax.ShapeDtypeStruct((experts, capacity, width), d_gate_ECF.dtype)
    grid = (pl.cdiv(capacity, tile.m), pl.cdiv(width, tile.n), experts)
    (d_x_ECD,) = _call(_d_x_kernel, grid, (out,), tile, interpret)(counts_E, d_gate_ECF, d_up_ECF, w_gate_EDF, w_up_EDF)
    return d_x_ECD


def d_weights(
    a_ECI: Float[Array, "E C I"], counts_E: Int[Array, "E"], *b_ECJ: Float[Array, "E C J"], tile: Tile, interpret: bool
) -> tuple[Float[Array, "E I J"], ...]:
    """a^T b over the live rows of each expert, for every b; exactly zero for an expert without rows."""
    experts, _, height = a_ECI.shape
    width = b_ECJ[0].shape[2]
    out = jax.ShapeDtypeStruct((experts, height, width), a_ECI.dtype)
    grid = (pl.cdiv(height, tile.m), pl.cdiv(width, tile.n), experts)
    return _call(_d_weights_kernel, grid, (out,) * len(b_ECJ), tile, interpret)(counts_E, a_ECI, *b_ECJ)


def _call(kernel: Any, grid: tuple[int, int, int], out_shape: tuple[Any, ...], tile: Tile, interpret: bool) -> Any:
    """The kernel as a function of counts and [E, ., .] operands; it sees the slices of its program's expert."""

    def run(counts_E: Array, *operands: Array) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, tile=tile),
            grid=grid,
            in_specs=[pl.BlockSpec(counts_E.shape, lambda m, n, e: (0,)), *map(_expert_slice, operands)],
            out_specs=tuple(map(_expert_slice, out_shape)),
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(counts_E, *operands)

    return run


def _expert_slice(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, *array.shape[1:]), lambda m, n, e: (e, 0, 0))


# The kernels. `m`, `n` are the first row and column of the program's tile, `live` the number of the expert's live
# rows, `k` the first index of a step along the contraction.


def _gate_up_kernel(counts_ref, x_ref, w_gate_ref, w_up_ref, hidden_ref, *kept_refs, tile):  # type: ignore[no-untyped-def]
    m, n, live = _position(counts_ref, x_ref, tile)

    def step(k, sums):  # type: ignore[no-untyped-def]
        x = _load(x_ref, m, k, tile.m, tile.k, rows=live)
        w_gate = _load(w_gate_ref, k, n, tile.k, tile.n)
        w_up = _load(w_up_ref, k, n, tile.k, tile.n)
        return sums[0] + _dot(x, w_gate), sums[1] + _dot(x, w_up)

    gate, up = _sum_steps(step, _steps_if(m < live, x_ref.shape[1], tile), tile, 2)
    dtype = hidden_ref.dtype
    _store(hidden_ref, m, n, swiglu(gate, up, dtype), rows=live)
    for ref, value in zip(kept_refs, (gate, up), strict=False):
        _store(ref, m, n, value.astype(dtype), rows=live)


def _down_kernel(counts_ref, hidden_ref, w_down_ref, y_ref, *, tile):  # type: ignore[no-untyped-def]
    m, n, live = _position(counts_ref, hidden_ref, tile)

    def step(k, sums):  # type: ignore[no-untyped-def]
        hidden = _load(hidden_ref, m, k, tile.m, tile.k, rows=live)
        return (sums[0] + _dot(hidden, _load(w_down_ref, k, n, tile.k, tile.n)),)

    (y,) = _sum_steps(step, _steps_if(m < live, hidden_ref.shape[1], tile), tile, 1)
    _store(y_ref, m, n, y.astype(y_ref.dtype))


def _d_gate_up_kernel(  # type: ignore[no-untyped-def]
    counts_ref, d_y_ref, w_down_ref, gate_ref, up_ref, hidden_ref, d_gate_ref, d_up_ref, *, tile
):
    m, n, live = _position(counts_ref, d_y_ref, tile)

    def step(k, sums):  # type: ignore[no-untyped-def]
        d_y = _load(d_y_ref, m, k, tile.m, tile.k, rows=live)
        return (sums[0] + _dot_nt(d_y, _load(w_down_ref, n, k, tile.n, tile.k)),)

    (d_hidden,) = _sum_steps(step, _steps_if(m < live, d_y_ref.shape[1], tile), tile, 1)
    gate = _load(gate_ref, m, n, tile.m, tile.n, rows=live)
    up = _load(up_ref, m, n, tile.m, tile.n, rows=live)
    for ref, value in zip((hidden_ref, d_gate_ref, d_up_ref), swiglu_vjp(gate, up, d_hidden), strict=True):
        _store(ref, m, n, value.astype(ref.dtype), rows=live)


def _d_x_kernel(counts_ref, d_gate_ref, d_up_ref, w_gate_ref, w_up_ref, d_x_ref, *, tile):  # type: ignore[no-untyped-def]
    m, n, live = _position(counts_ref, d_gate_ref, tile)
    pairs = [(d_gate_ref, w_gate_ref), (d_up_ref, w_up_ref)]

    def step(k, sums):  # type: ignore[no-untyped-def]
        (total,) = sums
        for d_ref, w_ref in pairs:
            d = _load(d_ref, m, k, tile.m, tile.k, rows=live)
            total += _dot_nt(d, _load(w_ref, n, k, tile.n, tile.k))
        return (total,)

    (d_x,) = _sum_steps(step, _steps_if(m < live, d_gate_ref.shape[1], tile), tile, 1)
    _store(d_x_ref, m, n, d_x.astype(d_x_ref.dtype))


def _d_weights_kernel(counts_ref, a_ref, *refs, tile):  # type: ignore[no-untyped-def]
    b_refs, out_refs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    m, n, live = _position(counts_ref, a_ref, tile)

    def step(k, sums):  # type: ignore[no-untyped-def]
        a = _load(a_ref, k, m, tile.k, tile.m, rows=live)
        b = [_load(ref, k, n, tile.k, tile.n, rows=live) for ref in b_refs]
        return tuple(total + _dot_tn(a, each) for total, each in zip(sums, b, strict=True))

    for ref, value in zip(out_refs, _sum_steps(step, pl.cdiv(live, tile.k), tile, len(b_refs)), strict=True):
        _store(ref, m, n, value.astype(ref.dtype))


def _position(counts_ref: Any, rows_ref: Any, tile: Tile) -> tuple[Array, Array, Array]:
    """(first row, first column, live rows of the expert) of this program."""
    live = jnp.minimum(counts_ref[pl.program_id(2)], rows_ref.shape[0])
    return pl.program_id(0) * tile.m, pl.program_id(1) * tile.n, live


def _steps_if(wanted: Array, length: int, tile: Tile) -> Array:
    """The steps that cover `length`, or none."""
    return wanted.astype(jnp.int32) * pl.cdiv(length, tile.k)


def _sum_steps(step: Any, steps: Array, tile: Tile, sums: int) -> tuple[Array, ...]:
    """`step(k, sums)` for k = 0, tile.k, .. `steps` times, from float32 zeros."""
    zeros = (jnp.zeros((tile.m, tile.n), jnp.float32),) * sums
    return lax.fori_loop(0, steps, lambda i, sums: step(i * tile.k, sums), zeros)


def _load(ref: Any, row: Array, column: Array, height: int, width: int, *, rows: Array | None = None) -> Array:
    """The [height, width] tile at (row, column); zero at or past `rows` and past the array's edges."""
    mask = _inside(ref.shape, row, column, height, width, rows)
    tile_ref = ref.at[pl.ds(row, height), pl.ds(column, width)]
    return plgpu.load(tile_ref) if mask is None else plgpu.load(tile_ref, mask=mask, other=0)


def _store(ref: Any, row: Array, column: Array, value: Array, *, rows: Array | None = None) -> None:
    """Writes the tile at (row, column) as far as it lies below `rows` and inside the array."""
    height, width = value.shape
    mask = _inside(ref.shape, row, column, height, width, rows)
    plgpu.store(ref.at[pl.ds(row, height), pl.ds(column, width)], value, mask=mask)


def _inside(
    shape: tuple[int, ...], row: Array, column: Array, height: int, width: int, rows: Array | None
) -> Array | None:
    """Mask of a tile's elements to touch; None, which compiles to faster code, where that is known to be all."""
    masks = []
    if rows is not None or shape[0] % height:
        limit = shape[0] if rows is None else rows
        masks.append(jnp.broadcast_to((row + jnp.arange(height) < limit)[:, None], (height, width)))
    if shape[1] % width:
        masks.append(jnp.broadcast_to((column + jnp.arange(width) < shape[1])[None, :], (height, width)))
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


_dot_nt = functools.partial(_dot, contract=(1, 1))  # a b^T
_dot_tn = functools.partial(_dot, contract=(0, 0))  # a^T b

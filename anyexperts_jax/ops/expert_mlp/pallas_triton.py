"""Pallas Triton kernels: six matmuls over the live rows of each expert, accumulated in float32.

    gate_up        silu(x w_gate) * (x w_up), and the two products themselves if the backward pass needs them
    down           hidden w_down
    d_gate_up      d_y w_down^T, propagated through the activation: hidden, d_gate, d_up
    d_x            d_gate w_gate^T + d_up w_up^T
    d_w_gate_up    x^T d_gate and x^T d_up in one pass over x
    d_w_down       hidden^T d_y

A program owns one tile of the result. A tile without live rows runs no step of its loop, so it costs a store of zeros,
or nothing if it is never read: dead rows of the buffers between kernels hold garbage, and every kernel masks the rows
it loads. `gpu_rows` explains how one kernel runs over both kinds of buffer. If x and d_y are `TokenRows`, the rows of a
tile are read from their tokens in place.

float32 operands are multiplied as TF32, as XLA's own dots are by default on these GPUs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp
from anyexperts_jax.ops.expert_mlp.gpu_rows import GpuRows, TokenRows
from anyexperts_jax.ops.expert_mlp.gpu_tiles import TritonTile


def gate_up(
    x_BCD: Float[Array, "B C D"] | TokenRows,
    rows: GpuRows,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    *,
    tile: TritonTile,
    keep: bool,
    interpret: bool,
) -> tuple[Float[Array, "B C F"], ...]:
    """(hidden,), or (hidden, gate, up) if `keep`; dead rows are undefined."""
    outs = (_like(x_BCD, w_gate_EDF.shape[2]),) * (3 if keep else 1)
    return _call(_gate_up_kernel, outs, tile, interpret)(*_blocks(rows), x_BCD, w_gate_EDF, w_up_EDF)


def down(
    hidden_BCF: Float[Array, "B C F"],
    rows: GpuRows,
    w_down_EFD: Float[Array, "E F D"],
    *,
    tile: TritonTile,
    zeros: bool,
    interpret: bool,
) -> Float[Array, "B C D"]:
    """hidden w_down. Dead rows of `hidden_BCF` may hold anything; those of the result are zero if `zeros`, else
    undefined."""
    kernel = functools.partial(_down_kernel, zeros=zeros)
    out = _like(hidden_BCF, w_down_EFD.shape[2])
    (y_BCD,) = _call(kernel, (out,), tile, interpret)(*_blocks(rows), hidden_BCF, w_down_EFD)
    return y_BCD


def d_gate_up(
    d_y_BCD: Float[Array, "B C D"] | TokenRows,
    rows: GpuRows,
    w_down_EFD: Float[Array, "E F D"],
    gate_BCF: Float[Array, "B C F"],
    up_BCF: Float[Array, "B C F"],
    *,
    tile: TritonTile,
    interpret: bool,
) -> tuple[Float[Array, "B C F"], Float[Array, "B C F"], Float[Array, "B C F"]]:
    """(hidden, gradient of gate, gradient of up); dead rows are undefined."""
    outs = (_like(gate_BCF, gate_BCF.shape[2]),) * 3
    return _call(_d_gate_up_kernel, outs, tile, interpret)(*_blocks(rows), d_y_BCD, w_down_EFD, gate_BCF, up_BCF)


def d_x(
    d_gate_BCF: Float[Array, "B C F"],
    d_up_BCF: Float[Array, "B C F"],
    rows: GpuRows,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    *,
    tile: TritonTile,
    zeros: bool,
    interpret: bool,
) -> Float[Array, "B C D"]:
    """Gradient of x; dead rows are zero if `zeros`, else undefined."""
    call = _call(
        functools.partial(_d_x_kernel, zeros=zeros), (_like(d_gate_BCF, w_gate_EDF.shape[1]),), tile, interpret
    )
    (d_x_BCD,) = call(*_blocks(rows), d_gate_BCF, d_up_BCF, w_gate_EDF, w_up_EDF)
    return d_x_BCD


def d_weights(
    a_ERI: Float[Array, "_ R I"] | TokenRows,
    rows: GpuRows,
    *b_ERJ: Float[Array, "_ R J"] | TokenRows,
    tile: TritonTile,
    interpret: bool,
) -> tuple[Float[Array, "E I J"], ...]:
    """a^T b over the live rows of each expert, for every b; exactly zero for an expert without rows.

    Args:
      a_ERI: [E, C, I], or the rows of all experts as [1, R, I].
    """
    out = jax.ShapeDtypeStruct((rows.counts_E.shape[0], a_ERI.shape[2], b_ERJ[0].shape[2]), a_ERI.dtype)
    call = _call(_d_weights_kernel, (out,) * len(b_ERJ), tile, interpret)
    return call(rows.starts_E, rows.counts_E, a_ERI, *b_ERJ)


def clean(a_BCI: Float[Array, "B C I"] | TokenRows, rows: GpuRows) -> Float[Array, "B C I"] | TokenRows:
    """Prepares rows for `d_weights`. Nothing is needed: `d_weights` masks dead rows itself."""
    del rows
    return a_BCI


def _blocks(rows: GpuRows) -> tuple[Array, Array]:
    return rows.experts_B, rows.counts_B


def _like(rows_BCI: Array | TokenRows, width: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*rows_BCI.shape[:2], width), rows_BCI.dtype)


def _call(kernel: Any, outs: tuple[Any, ...], tile: TritonTile, interpret: bool) -> Any:
    """The kernel over the tiles of its results, as a function of two integer vectors and the arrays."""
    body = functools.partial(kernel, tile=tile)
    name = getattr(kernel, "func", kernel).__name__.strip("_")
    slices, height, width = outs[0].shape
    return pl.pallas_call(
        body,
        # Rows vary fastest and experts slowest, so that programs in flight together share an expert's weights in L2.
        grid=(pl.cdiv(height, tile.m), pl.cdiv(width, tile.n), slices),
        out_shape=outs,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=name,
    )


# The kernels. `m`, `n` are the first row and column of the program's tile in block `b`, `e` the expert, `live` the
# number of live rows, `k` the first index of a step along the contraction.


def _gate_up_kernel(experts_ref, counts_ref, x_ref, w_gate_ref, w_up_ref, hidden_ref, *kept_refs, tile):  # type: ignore[no-untyped-def]
    b, m, n = _position(tile)
    e, live = experts_ref[b], counts_ref[b]
    tokens = _tokens(x_ref, b, m, tile.m, live)

    def step(k, sums):  # type: ignore[no-untyped-def]
        x = _load(x_ref, b, m, k, tile.m, tile.k, rows=live, tokens=tokens)
        w_gate = _load(w_gate_ref, e, k, n, tile.k, tile.n)
        w_up = _load(w_up_ref, e, k, n, tile.k, tile.n)
        return sums[0] + _dot(x, w_gate), sums[1] + _dot(x, w_up)

    gate, up = _sum_steps(step, _steps_if(m < live, x_ref.shape[2], tile), tile, 2)
    dtype = hidden_ref.dtype
    _store(hidden_ref, b, m, n, swiglu(gate, up, dtype), rows=live)
    for ref, value in zip(kept_refs, (gate, up), strict=False):  # without `keep` there are no references to store to
        _store(ref, b, m, n, value.astype(dtype), rows=live)


def _down_kernel(experts_ref, counts_ref, hidden_ref, w_down_ref, y_ref, *, tile, zeros):  # type: ignore[no-untyped-def]
    b, m, n = _position(tile)
    e, live = experts_ref[b], counts_ref[b]

    def step(k, sums):  # type: ignore[no-untyped-def]
        hidden = _load(hidden_ref, b, m, k, tile.m, tile.k, rows=live)
        return (sums[0] + _dot(hidden, _load(w_down_ref, e, k, n, tile.k, tile.n)),)

    (y,) = _sum_steps(step, _steps_if(m < live, hidden_ref.shape[2], tile), tile, 1)
    _store(y_ref, b, m, n, y.astype(y_ref.dtype), rows=None if zeros else live)


def _d_gate_up_kernel(  # type: ignore[no-untyped-def]
    experts_ref, counts_ref, d_y_ref, w_down_ref, gate_ref, up_ref, hidden_ref, d_gate_ref, d_up_ref, *, tile
):
    b, m, n = _position(tile)
    e, live = experts_ref[b], counts_ref[b]
    tokens = _tokens(d_y_ref, b, m, tile.m, live)

    def step(k, sums):  # type: ignore[no-untyped-def]
        d_y = _load(d_y_ref, b, m, k, tile.m, tile.k, rows=live, tokens=tokens)
        return (sums[0] + _dot_nt(d_y, _load(w_down_ref, e, n, k, tile.n, tile.k)),)

    (d_hidden,) = _sum_steps(step, _steps_if(m < live, d_y_ref.shape[2], tile), tile, 1)
    # Loaded after the loop, so that they do not occupy registers beside the accumulator during it.
    gate = _load(gate_ref, b, m, n, tile.m, tile.n, rows=live)
    up = _load(up_ref, b, m, n, tile.m, tile.n, rows=live)
    for ref, value in zip((hidden_ref, d_gate_ref, d_up_ref), swiglu_vjp(gate, up, d_hidden), strict=True):
        _store(ref, b, m, n, value.astype(ref.dtype), rows=live)


def _d_x_kernel(  # type: ignore[no-untyped-def]
    experts_ref, counts_ref, d_gate_ref, d_up_ref, w_gate_ref, w_up_ref, d_x_ref, *, tile, zeros
):
    b, m, n = _position(tile)
    e, live = experts_ref[b], counts_ref[b]

    def step(k, sums):  # type: ignore[no-untyped-def]
        (total,) = sums
        for d_ref, w_ref in ((d_gate_ref, w_gate_ref), (d_up_ref, w_up_ref)):
            d = _load(d_ref, b, m, k, tile.m, tile.k, rows=live)
            total += _dot_nt(d, _load(w_ref, e, n, k, tile.n, tile.k))
        return (total,)

    (d_x,) = _sum_steps(step, _steps_if(m < live, d_gate_ref.shape[2], tile), tile, 1)
    _store(d_x_ref, b, m, n, d_x.astype(d_x_ref.dtype), rows=None if zeros else live)


def _d_weights_kernel(starts_ref, counts_ref, a_ref, *refs, tile):  # type: ignore[no-untyped-def]
    b_refs, out_refs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    e, m, n = _position(tile)
    # [E, C, I] has a slice per expert, with starts of 0; [1, R, I] has one slice for all.
    b, start, live = jnp.minimum(e, a_ref.shape[0] - 1), starts_ref[e], counts_ref[e]

    def step(k, sums):  # type: ignore[no-untyped-def]
        row, end = start + k, start + live
        a, *factors = (
            _load(ref, b, row, column, tile.k, width, rows=end, tokens=_tokens(ref, b, row, tile.k, end))
            for ref, column, width in ((a_ref, m, tile.m), *((ref, n, tile.n) for ref in b_refs))
        )
        return tuple(total + _dot_tn(a, each) for total, each in zip(sums, factors, strict=True))

    # An expert without rows runs no step and stores zeros: its gradient is read all the same.
    for ref, value in zip(out_refs, _sum_steps(step, pl.cdiv(live, tile.k), tile, len(b_refs)), strict=True):
        _store(ref, e, m, n, value.astype(ref.dtype))


def _position(tile: TritonTile) -> tuple[Array, Array, Array]:
    """(slice of the result, first row, first column) of this program."""
    return pl.program_id(2), pl.program_id(0) * tile.m, pl.program_id(1) * tile.n


def _steps_if(wanted: Array, length: int, tile: TritonTile) -> Array:
    """The number of steps that cover `length`, or 0: an empty loop replaces an early return, which Pallas lacks."""
    return wanted.astype(jnp.int32) * pl.cdiv(length, tile.k)


def _sum_steps(step: Any, steps: Array, tile: TritonTile, sums: int) -> tuple[Array, ...]:
    """Runs `step(k, sums)` for k = 0, tile.k, ..., `steps` times, starting from float32 zeros."""
    zeros = (jnp.zeros((tile.m, tile.n), jnp.float32),) * sums
    return lax.fori_loop(0, steps, lambda i, sums: step(i * tile.k, sums), zeros)


def _tokens(ref: Any, at: Any, row: Array, height: int, rows: Array) -> Array | None:
    """The tokens of `height` rows of slice `at`, token 0 from row `rows` on; None if the rows are a buffer."""
    if not isinstance(ref, TokenRows):
        return None
    inside = row + jnp.arange(height) < jnp.minimum(rows, ref.shape[1])
    tokens_ref: Any = ref.tokens
    return plgpu.load(tokens_ref.at[at, pl.ds(row, height)], mask=inside, other=0)


def _load(
    ref: Any,
    at: Any,
    row: Array,
    column: Array,
    height: int,
    width: int,
    *,
    rows: Array | None = None,
    tokens: Array | None = None,
) -> Array:
    """The [height, width] tile at (row, column) of slice `at`, with zeros from row `rows` on and beyond the edges."""
    mask = _inside(ref.shape[1:], row, column, height, width, rows)
    if tokens is None:
        place: Any = (at, pl.ds(row, height), pl.ds(column, width))
    else:
        ref, place = ref.x_ND, (tokens[:, None], column + jnp.arange(width)[None, :])
        place = tuple(jnp.broadcast_to(one, (height, width)) for one in place)  # interpret mode does not broadcast
    tile_ref = ref.at[place]
    return plgpu.load(tile_ref) if mask is None else plgpu.load(tile_ref, mask=mask, other=0)


def _store(ref: Any, at: Any, row: Array, column: Array, value: Array, *, rows: Array | None = None) -> None:
    """Writes the tile at (row, column) of slice `at`, except for rows from `rows` on and parts beyond the edges."""
    height, width = value.shape
    mask = _inside(ref.shape[1:], row, column, height, width, rows)
    plgpu.store(ref.at[at, pl.ds(row, height), pl.ds(column, width)], value, mask=mask)


def _inside(
    shape: tuple[int, ...], row: Array, column: Array, height: int, width: int, rows: Array | None
) -> Array | None:
    """The mask of a tile's elements to access. None if all are: accesses without a mask compile to faster code."""
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

"""Pallas kernels for TPU: forward, gradients of the rows, gradients of the weights. None knows of differentiation.

Every kernel runs along a list of tiles (`tiles.py`) with the weights of the tile's expert resident in VMEM, so they
are read once an expert. A tile's matmuls run over its live rows, rounded up to `step`. What an input holds past an
expert's count never reaches a live row: the row kernels treat rows one by one and zero the dead ones of what they
return; the weights' gradients, which sum over rows, mask what they read.

Operands are bfloat16 or float32, D and F multiples of 128 and C of 16; sums are float32. float32 operands are
multiplied in full, not rounded to bfloat16 first.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops.expert_mlp.tiles import TileList, deal_tiles, list_tiles
from anyexperts_jax.ops.expert_mlp.tpu_grid import (
    Block,
    Grid,
    Operand,
    Ref,
    Slab,
    Step,
    for_each_slab,
    like,
    run_kernel,
    zero_dead,
)
from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes, TpuSizes

Refs = Sequence[Ref]
_LANES = 128
_CHUNK = 256  # columns of a result computed at a time
_TRANSPOSED_RIGHT = (((1,), (1,)), ((), ()))
_TRANSPOSED_LEFT = (((0,), (0,)), ((), ()))
_PLAIN = (((1,), (0,)), ((), ()))


def _dot(a: Any, b: Any, dimensions: Any = _PLAIN) -> Any:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _chunks(width: int, size: int = _CHUNK) -> Iterator[slice]:
    return (slice(start, min(start + size, width)) for start in range(0, width, size))


def _gate_up(x: Any, w_gate_ref: Ref, w_up_ref: Ref, columns: slice) -> tuple[Any, Any]:
    """x w_gate and x w_up, their columns alternating by 128 in one right-hand side, which fills a 256-wide matrix unit
    even where F is an odd multiple of 128."""
    lanes = [slice(s, s + _LANES) for s in range(columns.start, columns.stop, _LANES)]
    both = _dot(x, jnp.concatenate([ref[:, lane] for lane in lanes for ref in (w_gate_ref, w_up_ref)], axis=1))
    parts = [both[:, s : s + _LANES] for s in range(0, both.shape[1], _LANES)]
    return jnp.concatenate(parts[::2], axis=1), jnp.concatenate(parts[1::2], axis=1)


def _hidden(slab: Slab, x_ref: Ref, weights: Refs, hidden_ref: Ref, kept: Refs) -> None:
    """hidden = silu(gate) * up, gate = x w_gate, up = x w_up; `kept` takes gate and up."""
    x = x_ref[slab.rows, :]
    for columns in _chunks(hidden_ref.shape[1]):
        gate, up = _gate_up(x, weights[0], weights[1], columns)
        hidden_ref[slab.rows, columns] = (gate * jax.nn.sigmoid(gate) * up).astype(hidden_ref.dtype)
        if kept:
            kept[0][slab.rows, columns] = gate.astype(kept[0].dtype)
            kept[1][slab.rows, columns] = up.astype(kept[1].dtype)


def _down(slab: Slab, hidden_ref: Ref, w_down_ref: Ref, y_ref: Ref) -> None:
    """y = hidden w_down."""
    hidden = hidden_ref[slab.rows, :]
    for columns in _chunks(y_ref.shape[1], 2 * _CHUNK):
        y_ref[slab.rows, columns] = slab.mask(_dot(hidden, w_down_ref[:, columns])).astype(y_ref.dtype)


def _hidden_backward(slab: Slab, d_y_ref: Ref, given: Refs, weights: Refs, outputs: Refs) -> None:
    """Gradients of gate and up, and hidden once more. `given` is x, or gate and up as they were kept."""
    d_y = d_y_ref[slab.rows, :]
    for columns in _chunks(outputs[0].shape[1]):
        if len(given) == 1:
            gate, up = _gate_up(given[0][slab.rows, :], weights[0], weights[1], columns)
        else:
            gate, up = (ref[slab.rows, columns].astype(jnp.float32) for ref in given)
        d_hidden = _dot(d_y, weights[-1][columns, :], _TRANSPOSED_RIGHT)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        results = d_hidden * up * (sigmoid + silu * (1 - sigmoid)), d_hidden * silu, silu * up
        for ref, value in zip(outputs, results, strict=True):
            ref[slab.rows, columns] = value.astype(ref.dtype)


def _rows_backward(slab: Slab, d_gate_ref: Ref, d_up_ref: Ref, weights: Refs, d_x_ref: Ref) -> None:
    """d_x = d_gate w_gate^T + d_up w_up^T."""
    d_gate, d_up = d_gate_ref[slab.rows, :], d_up_ref[slab.rows, :]
    for columns in _chunks(d_x_ref.shape[1], 2 * _CHUNK):
        d_x = _dot(d_gate, weights[0][columns, :], _TRANSPOSED_RIGHT)
        d_x += _dot(d_up, weights[1][columns, :], _TRANSPOSED_RIGHT)
        d_x_ref[slab.rows, columns] = slab.mask(d_x).astype(d_x_ref.dtype)


def _weights_backward(slab: Slab, fresh: Any, inputs: Refs, totals: Refs) -> None:
    """Adds x^T d_gate, x^T d_up and hidden^T d_y to `totals`, which begin anew where `fresh` (None: always)."""
    x_ref, d_y_ref, d_gate_ref, d_up_ref, hidden_ref = inputs
    pairs = ((x_ref, d_gate_ref), (x_ref, d_up_ref), (hidden_ref, d_y_ref))
    for (left_ref, right_ref), total_ref in zip(pairs, totals, strict=True):
        right = slab.mask(right_ref[slab.rows, :])
        for columns in _chunks(left_ref.shape[1]):
            total = _dot(slab.mask(left_ref[slab.rows, columns]), right, _TRANSPOSED_LEFT)
            if fresh is not None:
                total += jnp.where(fresh, 0.0, total_ref[columns, :])
            total_ref[columns, :] = total.astype(total_ref.dtype)


def _forward_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    (x_ref, *w_hidden, w_down_ref), (y_ref, *kept), (hidden_ref,) = inputs, outputs, scratch

    def run(slab: Slab) -> None:
        _hidden(slab, x_ref, w_hidden, hidden_ref, kept)
        _down(slab, hidden_ref, w_down_ref, y_ref)

    for_each_slab(step.live, sizes, run)
    zero_dead(y_ref, step.live, sizes)


def _hidden_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    (x_ref, *weights), (hidden_ref, *kept) = inputs, outputs
    for_each_slab(step.live, sizes, lambda slab: _hidden(slab, x_ref, weights, hidden_ref, kept))


def _down_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    for_each_slab(step.live, sizes, lambda slab: _down(slab, *inputs, *outputs))
    zero_dead(outputs[0], step.live, sizes)


def _backward_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    d_y_ref, *given, w_gate_ref, w_up_ref, w_down_ref = inputs
    d_x_ref, *d_hidden = outputs

    def run(slab: Slab) -> None:
        _hidden_backward(slab, d_y_ref, given, (w_gate_ref, w_up_ref, w_down_ref), d_hidden)
        _rows_backward(slab, d_hidden[0], d_hidden[1], (w_gate_ref, w_up_ref), d_x_ref)

    for_each_slab(step.live, sizes, run)
    zero_dead(d_x_ref, step.live, sizes)


def _hidden_backward_kernel(
    step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes, num_given: int
) -> None:
    d_y_ref, given, weights = inputs[0], inputs[1 : 1 + num_given], inputs[1 + num_given :]
    for_each_slab(step.live, sizes, lambda slab: _hidden_backward(slab, d_y_ref, given, weights, outputs))


def _rows_backward_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    d_gate_ref, d_up_ref, *weights = inputs
    for_each_slab(step.live, sizes, lambda slab: _rows_backward(slab, d_gate_ref, d_up_ref, weights, outputs[0]))
    zero_dead(outputs[0], step.live, sizes)


def _weights_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    @pl.when(step.live == 0)
    def _() -> None:
        for ref in outputs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def run(slab: Slab) -> None:
        fresh = (step.opens == 1) & (slab.start == 0) if scratch else None
        _weights_backward(slab, fresh, inputs, scratch or outputs)

    for_each_slab(step.live, sizes, run)
    if scratch:

        @pl.when((step.live > 0) & (step.closes == 1))
        def _() -> None:
            for total_ref, ref in zip(scratch, outputs, strict=True):
                ref[...] = total_ref[...].astype(ref.dtype)


def _row_grid(tiles: TileList, cores: int) -> Grid:
    """All tiles, shared among the cores."""
    total = tiles.rows.size - 1
    return Grid(deal_tiles(tiles, cores), total, outer=cores, split=True) if total > 1 else Grid(tiles, total)


def forward(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    sizes: TpuSizes,
    keep: bool,
    interpret: Any = False,
) -> tuple[Float[Array, "E C D"], tuple[Float[Array, "E C F"], ...]]:
    """(y_ECD, (gate_ECF, up_ECF) if `keep` else ()). Dead rows of y are zero, those of gate and up hold anything."""
    own = sizes.forward
    (experts, capacity, width), hidden = x_ECD.shape, w_gate_EDF.shape[2]
    call = functools.partial(run_kernel, vmem_bytes=sizes.vmem_bytes, interpret=interpret)
    tiles = list_tiles(counts_E, capacity, own.block)
    x, y = Operand(x_ECD, Block("tile", own.block, width)), like(x_ECD, experts, capacity, width)
    row_ECF = like(x_ECD, experts, capacity, hidden)
    if own.columns is None:
        up, down = Block("expert", width, hidden), Block("expert", hidden, width)
        y_ECD, *kept = call(
            functools.partial(_forward_kernel, sizes=own),
            "expert_mlp_forward",
            _row_grid(tiles, sizes.cores),
            [x, Operand(w_gate_EDF, up), Operand(w_up_EDF, up), Operand(w_down_EFD, down)],
            [Operand(y, x.block), *[Operand(row_ECF, Block("tile", own.block, hidden))] * (2 * keep)],
            scratch=[pltpu.VMEM((own.block, hidden), x_ECD.dtype)],
        )
        return y_ECD, tuple(kept)
    up = Block("expert", width, own.columns, "columns")
    hidden_ECF, *kept = call(
        functools.partial(_hidden_kernel, sizes=own),
        "expert_mlp_forward_hidden",
        Grid(tiles, jnp.maximum(tiles.num_live, 1), outer=pl.cdiv(hidden, own.columns)),
        [x, Operand(w_gate_EDF, up), Operand(w_up_EDF, up)],
        [Operand(row_ECF, Block("tile", own.block, own.columns, "columns"))] * (1 + 2 * keep),
    )
    (y_ECD,) = call(
        functools.partial(_down_kernel, sizes=own),
        "expert_mlp_forward_down",
        Grid(tiles, tiles.rows.size - 1, outer=pl.cdiv(width, own.columns)),
        [
            Operand(hidden_ECF, Block("tile", own.block, hidden)),
            Operand(w_down_EFD, Block("expert", hidden, own.columns, "columns")),
        ],
        [Operand(y, Block("tile", own.block, own.columns, "columns"))],
    )
    return y_ECD, tuple(kept)


def rows_backward(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    kept: tuple[Float[Array, "E C F"], ...],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    d_y_ECD: Float[Array, "E C D"],
    *,
    sizes: TpuSizes,
    interpret: Any = False,
) -> tuple[Float[Array, "E C D"], tuple[Float[Array, "E C F"], ...]]:
    """(d_x_ECD, (d_gate_ECF, d_up_ECF, hidden_ECF)). Dead rows of d_x are zero, those of the others hold anything.

    `kept` is what `forward` kept; where that is nothing, gate and up are computed again from x.
    """
    own = sizes.backward
    (experts, capacity, width), hidden = x_ECD.shape, w_gate_EDF.shape[2]
    call = functools.partial(run_kernel, vmem_bytes=sizes.vmem_bytes, interpret=interpret)
    tiles = list_tiles(counts_E, capacity, own.block)
    wide_row = Block("tile", own.block, width)
    row_ECF, d_x = like(x_ECD, experts, capacity, hidden), like(x_ECD, experts, capacity, width)
    if own.columns is None:
        up, down, row = Block("expert", width, hidden), Block("expert", hidden, width), Block("tile", own.block, hidden)
        given = [Operand(a, row) for a in kept] or [Operand(x_ECD, wide_row)]
        d_x_ECD, *d_hidden = call(
            functools.partial(_backward_kernel, sizes=own),
            "expert_mlp_backward",
            _row_grid(tiles, sizes.cores),
            [
                Operand(d_y_ECD, wide_row),
                *given,
                Operand(w_gate_EDF, up),
                Operand(w_up_EDF, up),
                Operand(w_down_EFD, down),
            ],
            [Operand(d_x, wide_row), *[Operand(row_ECF, row)] * 3],
        )
        return d_x_ECD, tuple(d_hidden)
    row = Block("tile", own.block, own.columns, "columns")
    up, down = Block("expert", width, own.columns, "columns"), Block("expert", own.columns, width, "rows")
    given = [Operand(a, row) for a in kept] or [Operand(x_ECD, wide_row)]
    weights = [] if kept else [Operand(w_gate_EDF, up), Operand(w_up_EDF, up)]
    d_hidden = call(
        functools.partial(_hidden_backward_kernel, sizes=own, num_given=len(given)),
        "expert_mlp_backward_hidden",
        Grid(tiles, jnp.maximum(tiles.num_live, 1), outer=pl.cdiv(hidden, own.columns)),
        [Operand(d_y_ECD, wide_row), *given, *weights, Operand(w_down_EFD, down)],
        [Operand(row_ECF, row)] * 3,
    )
    up_rows = Block("expert", own.columns, hidden, "rows")
    (d_x_ECD,) = call(
        functools.partial(_rows_backward_kernel, sizes=own),
        "expert_mlp_backward_rows",
        Grid(tiles, tiles.rows.size - 1, outer=pl.cdiv(width, own.columns)),
        [
            *(Operand(a, Block("tile", own.block, hidden)) for a in d_hidden[:2]),
            Operand(w_gate_EDF, up_rows),
            Operand(w_up_EDF, up_rows),
        ],
        [Operand(d_x, row)],
    )
    return d_x_ECD, tuple(d_hidden)


def weights_backward(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    d_gate_ECF: Float[Array, "E C F"],
    d_up_ECF: Float[Array, "E C F"],
    hidden_ECF: Float[Array, "E C F"],
    d_y_ECD: Float[Array, "E C D"],
    *,
    sizes: TpuSizes,
    interpret: Any = False,
) -> tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]:
    """Gradients of w_gate, w_up and w_down; exactly zero for an expert without rows. Dead rows may hold anything."""
    own = sizes.weights
    (experts, capacity, width), hidden = x_ECD.shape, d_gate_ECF.shape[2]
    columns = own.columns or hidden
    tiles = list_tiles(counts_E, capacity, own.block)
    wide_row, row = Block("tile", own.block, width), Block("tile", own.block, columns, "columns")
    up, down = Block("expert", width, columns, "columns"), Block("expert", columns, width, "rows")
    one_pass = own.block == own.slab and capacity <= own.block
    totals = [pltpu.VMEM((block.rows, block.columns), jnp.float32) for block in (up, up, down)]
    d_up = Operand(like(x_ECD, experts, width, hidden), up)
    results = run_kernel(
        functools.partial(_weights_kernel, sizes=own),
        "expert_mlp_backward_weights",
        Grid(tiles, tiles.num_touched, outer=pl.cdiv(hidden, columns)),
        [
            Operand(x_ECD, wide_row),
            Operand(d_y_ECD, wide_row),
            *(Operand(a, row) for a in (d_gate_ECF, d_up_ECF, hidden_ECF)),
        ],
        [d_up, d_up, Operand(like(x_ECD, experts, hidden, width), down)],
        vmem_bytes=sizes.vmem_bytes,
        interpret=interpret,
        scratch=[] if one_pass else totals,
    )
    d_w_gate_EDF, d_w_up_EDF, d_w_down_EFD = results
    return d_w_gate_EDF, d_w_up_EDF, d_w_down_EFD

"""Pallas kernels for TPU: forward, gradients of the rows, gradients of the weights. None knows of differentiation.

Every kernel runs along a list of tiles (`tiles.py`) with the weights of the tile's expert resident in VMEM, so they
are read once an expert. A tile's matmuls run over its live rows, rounded up to `step`. What an input holds past an
expert's count never reaches a live row: the row kernels treat rows one by one and zero the dead ones of what they
return; the weights' gradients, which sum over rows, mask what they read.

Given `starts_E`, the same kernels run over one block-aligned buffer, [1, R, D], of which they touch live tiles alone:
other tiles of what they return hold anything.

Operands are bfloat16 or float32, D and F multiples of 128 and C of 16; sums are float32. float32 operands are
multiplied in full, not rounded to bfloat16 first.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops.expert_mlp.tiles import deal_tiles, list_aligned_tiles, list_tiles
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
    parts = _lanes(both)
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


def _down(slab: Slab, hidden_ref: Ref, w_down_ref: Ref, y_ref: Ref, inner: int | None) -> None:
    """y = hidden w_down, `inner` columns of hidden at a time."""
    parts = list(_chunks(hidden_ref.shape[1], inner or hidden_ref.shape[1]))
    hidden = [hidden_ref[slab.rows, part] for part in parts]
    for columns in _chunks(y_ref.shape[1], 2 * _CHUNK):
        y = _dot(hidden[0], w_down_ref[parts[0], columns])
        for value, part in zip(hidden[1:], parts[1:], strict=True):
            y += _dot(value, w_down_ref[part, columns])
        y_ref[slab.rows, columns] = slab.mask(y).astype(y_ref.dtype)


def _hidden_backward(slab: Slab, d_y_ref: Ref, given: Refs, weights: Refs, outputs: Refs, slots: Refs = ()) -> None:
    """Gradients of gate and up, and hidden once more. `given` is x, or gate and up as they were kept.

    With `slots`, rows' weights and what takes their gradients: all three times the row's weight, and the gradient as
    128 sums, each over every 128th column.
    """
    d_y = d_y_ref[slab.rows, :]
    sums = jnp.zeros((slab.size, _LANES), jnp.float32)
    for columns in _chunks(outputs[0].shape[1]):
        if len(given) == 1:
            gate, up = _gate_up(given[0][slab.rows, :], weights[0], weights[1], columns)
        else:
            gate, up = (ref[slab.rows, columns].astype(jnp.float32) for ref in given)
        d_hidden = _dot(d_y, weights[-1][columns, :], _TRANSPOSED_RIGHT)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        if slots:
            sums += sum(_lanes(d_hidden * hidden))
            weight = jnp.concatenate([slots[0][slab.rows, :]] * (hidden.shape[1] // _LANES), axis=1)
            d_hidden, hidden = d_hidden * weight, hidden * weight
        results = d_hidden * up * (sigmoid + silu * (1 - sigmoid)), d_hidden * silu, hidden
        for ref, value in zip(outputs, results, strict=True):
            ref[slab.rows, columns] = value.astype(ref.dtype)
    if slots:
        slots[1][slab.rows, :] = sums


def _lanes(value: Any) -> list[Any]:
    return [value[:, s : s + _LANES] for s in range(0, value.shape[1], _LANES)]


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
        _down(slab, hidden_ref, w_down_ref, y_ref, sizes.inner)

    for_each_slab(step.live, sizes, run)
    zero_dead(y_ref, step.live, sizes)


def _hidden_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    (x_ref, *weights), (hidden_ref, *kept) = inputs, outputs
    for_each_slab(step.live, sizes, lambda slab: _hidden(slab, x_ref, weights, hidden_ref, kept))


def _down_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    (hidden_ref, w_down_ref), (y_ref,) = inputs, outputs
    for_each_slab(step.live, sizes, lambda slab: _down(slab, hidden_ref, w_down_ref, y_ref, sizes.inner))
    zero_dead(y_ref, step.live, sizes)


def _backward_kernel(
    step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes, weighted: bool
) -> None:
    d_y_ref, *given, w_gate_ref, w_up_ref, w_down_ref = inputs
    d_x_ref, *d_hidden = outputs
    slots = (given.pop(), d_hidden.pop()) if weighted else ()

    def run(slab: Slab) -> None:
        _hidden_backward(slab, d_y_ref, given, (w_gate_ref, w_up_ref, w_down_ref), d_hidden, slots)
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


def _row_grid(counts_E: Array, starts_E: Array | None, capacity: int, block: int) -> Grid:
    """All tiles, or in a block-aligned buffer the live ones."""
    if starts_E is None:
        tiles = list_tiles(counts_E, capacity, block)
        return Grid(tiles, tiles.rows.size - 1)
    tiles = list_aligned_tiles(starts_E, counts_E, capacity // block, block, empty=False)
    return Grid(tiles, jnp.maximum(tiles.num_live, 1), flat=True)


def _shared(grid: Grid, cores: int) -> Grid:
    """The same tiles, shared among the cores."""
    cores = min(cores, grid.tiles.rows.size - 1)
    tiles = grid.tiles if grid.flat else deal_tiles(grid.tiles, cores)
    return dataclasses.replace(grid, tiles=tiles, outer=cores, split=True) if cores > 1 else grid


def forward(
    x_ECD: Float[Array, "#E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    sizes: TpuSizes,
    keep: bool,
    starts_E: Int[Array, "E"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "#E C D"], tuple[Float[Array, "#E C F"], ...]]:
    """(y_ECD, (gate_ECF, up_ECF) if `keep` else ()). Dead rows of y are zero, those of gate and up hold anything."""
    own = sizes.forward
    (experts, capacity, width), hidden = x_ECD.shape, w_gate_EDF.shape[2]
    call = functools.partial(run_kernel, vmem_bytes=sizes.vmem_bytes, interpret=interpret)
    grid = _row_grid(counts_E, starts_E, capacity, own.block)
    x, y = Operand(x_ECD, Block("tile", own.block, width)), like(x_ECD, experts, capacity, width)
    row_ECF = like(x_ECD, experts, capacity, hidden)
    if own.columns is None:
        up, down = Block("expert", width, hidden), Block("expert", hidden, width)
        y_ECD, *kept = call(
            functools.partial(_forward_kernel, sizes=own),
            "expert_mlp_forward",
            _shared(grid, sizes.cores),
            [x, Operand(w_gate_EDF, up), Operand(w_up_EDF, up), Operand(w_down_EFD, down)],
            [Operand(y, x.block), *[Operand(row_ECF, Block("tile", own.block, hidden))] * (2 * keep)],
            scratch=[pltpu.VMEM((own.block, hidden), x_ECD.dtype)],
        )
        return y_ECD, tuple(kept)
    up = Block("expert", width, own.columns, "columns")
    hidden_ECF, *kept = call(
        functools.partial(_hidden_kernel, sizes=own),
        "expert_mlp_forward_hidden",
        Grid(grid.tiles, jnp.maximum(grid.tiles.num_live, 1), outer=pl.cdiv(hidden, own.columns), flat=grid.flat),
        [x, Operand(w_gate_EDF, up), Operand(w_up_EDF, up)],
        [Operand(row_ECF, Block("tile", own.block, own.columns, "columns"))] * (1 + 2 * keep),
    )
    (y_ECD,) = call(
        functools.partial(_down_kernel, sizes=own),
        "expert_mlp_forward_down",
        Grid(grid.tiles, grid.steps, outer=pl.cdiv(width, own.columns), flat=grid.flat),
        [
            Operand(hidden_ECF, Block("tile", own.block, hidden)),
            Operand(w_down_EFD, Block("expert", hidden, own.columns, "columns")),
        ],
        [Operand(y, Block("tile", own.block, own.columns, "columns"))],
    )
    return y_ECD, tuple(kept)


def rows_backward(
    x_ECD: Float[Array, "#E C D"],
    counts_E: Int[Array, "E"],
    kept: tuple[Float[Array, "#E C F"], ...],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    d_y_ECD: Float[Array, "#E C D"],
    *,
    sizes: TpuSizes,
    starts_E: Int[Array, "E"] | None = None,
    slot_weights: Float[Array, "#E C 128"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "#E C D"], tuple[Float[Array, "#E C _"], ...]]:
    """(d_x_ECD, (d_gate_ECF, d_up_ECF, hidden_ECF)). Dead rows of d_x are zero, those of the others hold anything.

    `kept` is what `forward` kept; where that is nothing, gate and up are computed again from x. With `slot_weights`,
    the weight of each row 128 times, all results, hidden too, are times the weight, and a fourth beside hidden,
    [E, C, 128], adds up to the weights' gradients. Only where `sizes.backward` keeps whole weights.
    """
    own = sizes.backward
    (experts, capacity, width), hidden = x_ECD.shape, w_gate_EDF.shape[2]
    call = functools.partial(run_kernel, vmem_bytes=sizes.vmem_bytes, interpret=interpret)
    grid = _row_grid(counts_E, starts_E, capacity, own.block)
    wide_row = Block("tile", own.block, width)
    row_ECF, d_x = like(x_ECD, experts, capacity, hidden), like(x_ECD, experts, capacity, width)
    if own.columns is None:
        up, down, row = Block("expert", width, hidden), Block("expert", hidden, width), Block("tile", own.block, hidden)
        given = [Operand(a, row) for a in kept] or [Operand(x_ECD, wide_row)]
        slots = [] if slot_weights is None else [Operand(slot_weights, Block("tile", own.block, _LANES))]
        d_x_ECD, *d_hidden = call(
            functools.partial(_backward_kernel, sizes=own, weighted=bool(slots)),
            "expert_mlp_backward",
            _shared(grid, sizes.cores),
            [
                Operand(d_y_ECD, wide_row),
                *given,
                *slots,
                Operand(w_gate_EDF, up),
                Operand(w_up_EDF, up),
                Operand(w_down_EFD, down),
            ],
            [
                Operand(d_x, wide_row),
                *[Operand(row_ECF, row)] * 3,
                *(Operand(jax.ShapeDtypeStruct(slot.array.shape, jnp.float32), slot.block) for slot in slots),
            ],
        )
        return d_x_ECD, tuple(d_hidden)
    row = Block("tile", own.block, own.columns, "columns")
    up, down = Block("expert", width, own.columns, "columns"), Block("expert", own.columns, width, "rows")
    given = [Operand(a, row) for a in kept] or [Operand(x_ECD, wide_row)]
    weights = [] if kept else [Operand(w_gate_EDF, up), Operand(w_up_EDF, up)]
    d_hidden = call(
        functools.partial(_hidden_backward_kernel, sizes=own, num_given=len(given)),
        "expert_mlp_backward_hidden",
        Grid(grid.tiles, jnp.maximum(grid.tiles.num_live, 1), outer=pl.cdiv(hidden, own.columns), flat=grid.flat),
        [Operand(d_y_ECD, wide_row), *given, *weights, Operand(w_down_EFD, down)],
        [Operand(row_ECF, row)] * 3,
    )
    up_rows = Block("expert", own.columns, hidden, "rows")
    (d_x_ECD,) = call(
        functools.partial(_rows_backward_kernel, sizes=own),
        "expert_mlp_backward_rows",
        Grid(grid.tiles, grid.steps, outer=pl.cdiv(width, own.columns), flat=grid.flat),
        [
            *(Operand(a, Block("tile", own.block, hidden)) for a in d_hidden[:2]),
            Operand(w_gate_EDF, up_rows),
            Operand(w_up_EDF, up_rows),
        ],
        [Operand(d_x, row)],
    )
    return d_x_ECD, tuple(d_hidden)


def weights_backward(
    x_ECD: Float[Array, "#E C D"],
    counts_E: Int[Array, "E"],
    d_gate_ECF: Float[Array, "#E C F"],
    d_up_ECF: Float[Array, "#E C F"],
    hidden_ECF: Float[Array, "#E C F"],
    d_y_ECD: Float[Array, "#E C D"],
    *,
    sizes: TpuSizes,
    starts_E: Int[Array, "E"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]:
    """Gradients of w_gate, w_up and w_down; exactly zero for an expert without rows. Dead rows may hold anything."""
    own = sizes.weights
    (_, capacity, width), experts, hidden = x_ECD.shape, counts_E.shape[0], d_gate_ECF.shape[2]
    columns = own.columns or hidden
    if starts_E is None:
        tiles = list_tiles(counts_E, capacity, own.block)
    else:
        tiles = list_aligned_tiles(starts_E, counts_E, capacity // own.block, own.block, empty=True)
    wide_row, row = Block("tile", own.block, width), Block("tile", own.block, columns, "columns")
    up, down = Block("expert", width, columns, "columns"), Block("expert", columns, width, "rows")
    one_pass = own.block == own.slab and capacity <= own.block
    totals = [pltpu.VMEM((block.rows, block.columns), jnp.float32) for block in (up, up, down)]
    d_up = Operand(like(x_ECD, experts, width, hidden), up)
    results = run_kernel(
        functools.partial(_weights_kernel, sizes=own),
        "expert_mlp_backward_weights",
        Grid(tiles, tiles.num_touched, outer=pl.cdiv(hidden, columns), flat=starts_E is not None),
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

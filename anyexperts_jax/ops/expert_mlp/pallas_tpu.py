"""Pallas kernels for TPU: forward, gradients of the rows, gradients of the weights. They know nothing of derivatives.

Every kernel runs along a list of tiles (`tiles.py`) with the weights of the tile's expert resident in VMEM, so an
expert's weights are read once. A tile's matmuls run over its live rows, rounded up to `step`. What an input holds
beyond an expert's count never reaches a live row: the row kernels treat every row by itself and zero the dead rows of
their results; the weight gradients, which sum over rows, mask their inputs.

Given `starts_E`, the same kernels run over one block-aligned buffer [1, R, D] and touch its live tiles only; the other
tiles of their results are undefined.

Operands are bfloat16 or float32, with D and F multiples of 128 and C of 16; sums are float32. float32 operands are
multiplied at full precision, not rounded to bfloat16. The bodies of the kernels are in `tpu_bodies.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops.expert_mlp import tpu_bodies
from anyexperts_jax.ops.expert_mlp.tiles import deal_tiles, list_aligned_tiles, list_tiles
from anyexperts_jax.ops.expert_mlp.tpu_grid import Block, Grid, Operand, output_like, run_kernel
from anyexperts_jax.ops.expert_mlp.tpu_sizes import TpuSizes


def _row_grid(counts_E: Array, starts_E: Array | None, capacity: int, block: int) -> Grid:
    """All tiles of [E, C, D], whose dead rows must be zeroed, or only the live ones of a block-aligned buffer."""
    if starts_E is None:
        tiles = list_tiles(counts_E, capacity, block)
        return Grid(tiles, tiles.rows.size - 1)
    tiles = list_aligned_tiles(starts_E, counts_E, capacity // block, block, empty=False)
    return Grid(tiles, jnp.maximum(tiles.num_live, 1), flat=True)


def _shared(grid: Grid, cores: int) -> Grid:
    """The same tiles, divided among the cores."""
    cores = min(cores, grid.tiles.rows.size - 1)
    tiles = grid.tiles if grid.flat else deal_tiles(grid.tiles, cores)
    return dataclasses.replace(grid, tiles=tiles, outer=cores, split=True) if cores > 1 else grid


def _with_first(grid: Grid, first: Int[Array, ""] | None) -> Grid:
    """The same tiles, whose experts are counted from number `first` on. All rows must be in one buffer."""
    if first is None:
        return grid
    return dataclasses.replace(grid, tiles=grid.tiles._replace(source_expert=grid.tiles.source_expert + first))


def forward(
    x_ECD: Float[Array, "#E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "_ D F"],
    w_up_EDF: Float[Array, "_ D F"],
    w_down_EFD: Float[Array, "_ F D"],
    *,
    sizes: TpuSizes,
    keep: bool,
    starts_E: Int[Array, "E"] | None = None,
    first: Int[Array, ""] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "#E C D"], tuple[Float[Array, "#E C F"], ...]]:
    """(y_ECD, (gate_ECF, up_ECF) if `keep` else ()). Dead rows are zero in y, undefined in gate and up.

    With `starts_E`, the weights may be those of more experts, [L * E, D, F]: expert e then has number `first` + e.
    """
    own = sizes.forward
    (experts, capacity, width), hidden = x_ECD.shape, w_gate_EDF.shape[2]
    call = functools.partial(run_kernel, vmem_bytes=sizes.vmem_bytes, interpret=interpret)
    grid = _with_first(_row_grid(counts_E, starts_E, capacity, own.block), first)
    x, y = Operand(x_ECD, Block("tile", own.block, width)), output_like(x_ECD, experts, capacity, width)
    row_ECF = output_like(x_ECD, experts, capacity, hidden)
    if own.columns is None:
        up, down = Block("expert", width, hidden), Block("expert", hidden, width)
        y_ECD, *kept = call(
            functools.partial(tpu_bodies.forward_kernel, sizes=own),
            "expert_mlp_forward",
            _shared(grid, sizes.cores),
            [x, Operand(w_gate_EDF, up), Operand(w_up_EDF, up), Operand(w_down_EFD, down)],
            [Operand(y, x.block), *[Operand(row_ECF, Block("tile", own.block, hidden))] * (2 * keep)],
            scratch=[pltpu.VMEM((own.block, hidden), x_ECD.dtype)],
        )
        return y_ECD, tuple(kept)
    # An expert's weights exceed VMEM: two kernels, each with some columns of the weights resident. The outer grid axis
    # goes over the columns, and hidden makes a round trip through HBM between the two.
    up = Block("expert", width, own.columns, "columns")
    hidden_ECF, *kept = call(
        functools.partial(tpu_bodies.hidden_kernel, sizes=own),
        "expert_mlp_forward_hidden",
        Grid(grid.tiles, jnp.maximum(grid.tiles.num_live, 1), outer=pl.cdiv(hidden, own.columns), flat=grid.flat),
        [x, Operand(w_gate_EDF, up), Operand(w_up_EDF, up)],
        [Operand(row_ECF, Block("tile", own.block, own.columns, "columns"))] * (1 + 2 * keep),
    )
    (y_ECD,) = call(
        functools.partial(tpu_bodies.down_kernel, sizes=own),
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
    """(d_x_ECD, (d_gate_ECF, d_up_ECF, hidden_ECF)). Dead rows are zero in d_x, undefined in the others.

    `kept` is what `forward` kept; if that is empty, gate and up are recomputed from x. `slot_weights` holds the combine
    weight of each row, 128 times. If given, all results including hidden are multiplied by it, and a fourth array
    [E, C, 128] follows hidden, whose sums over the last axis are the gradients of the combine weights. This requires
    `sizes.backward` to keep an expert's weights whole.
    """
    own = sizes.backward
    (experts, capacity, width), hidden = x_ECD.shape, w_gate_EDF.shape[2]
    call = functools.partial(run_kernel, vmem_bytes=sizes.vmem_bytes, interpret=interpret)
    grid = _row_grid(counts_E, starts_E, capacity, own.block)
    wide_row = Block("tile", own.block, width)
    row_ECF, d_x = output_like(x_ECD, experts, capacity, hidden), output_like(x_ECD, experts, capacity, width)
    if own.columns is None:
        up, down, row = Block("expert", width, hidden), Block("expert", hidden, width), Block("tile", own.block, hidden)
        given = [Operand(a, row) for a in kept] or [Operand(x_ECD, wide_row)]
        slots = [] if slot_weights is None else [Operand(slot_weights, Block("tile", own.block, tpu_bodies.LANES))]
        d_x_ECD, *d_hidden = call(
            functools.partial(tpu_bodies.backward_kernel, sizes=own, weighted=bool(slots)),
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
    # As in `forward`: two kernels, because the weights do not fit as a whole.
    row = Block("tile", own.block, own.columns, "columns")
    up, down = Block("expert", width, own.columns, "columns"), Block("expert", own.columns, width, "rows")
    given = [Operand(a, row) for a in kept] or [Operand(x_ECD, wide_row)]
    weights = [] if kept else [Operand(w_gate_EDF, up), Operand(w_up_EDF, up)]
    d_hidden = call(
        functools.partial(tpu_bodies.hidden_backward_kernel, sizes=own, num_given=len(given)),
        "expert_mlp_backward_hidden",
        Grid(grid.tiles, jnp.maximum(grid.tiles.num_live, 1), outer=pl.cdiv(hidden, own.columns), flat=grid.flat),
        [Operand(d_y_ECD, wide_row), *given, *weights, Operand(w_down_EFD, down)],
        [Operand(row_ECF, row)] * 3,
    )
    up_rows = Block("expert", own.columns, hidden, "rows")
    (d_x_ECD,) = call(
        functools.partial(tpu_bodies.rows_backward_kernel, sizes=own),
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
    """Gradients of w_gate, w_up and w_down; exactly zero for an expert without rows. Dead inputs may hold anything."""
    own = sizes.weights
    (_, capacity, width), experts, hidden = x_ECD.shape, counts_E.shape[0], d_gate_ECF.shape[2]
    columns = own.columns or hidden
    if starts_E is None:
        tiles = list_tiles(counts_E, capacity, own.block)
    else:
        tiles = list_aligned_tiles(starts_E, counts_E, capacity // own.block, own.block, empty=True)
    wide_row, row = Block("tile", own.block, width), Block("tile", own.block, columns, "columns")
    up, down = Block("expert", width, columns, "columns"), Block("expert", columns, width, "rows")
    # If an expert's rows fit in one slab, its gradient is a single matmul and needs no float32 accumulators.
    one_pass = own.block == own.slab and capacity <= own.block
    totals = [pltpu.VMEM((block.rows, block.columns), jnp.float32) for block in (up, up, down)]
    d_up = Operand(output_like(x_ECD, experts, width, hidden), up)
    results = run_kernel(
        functools.partial(tpu_bodies.weights_kernel, sizes=own),
        "expert_mlp_backward_weights",
        Grid(tiles, tiles.num_touched, outer=pl.cdiv(hidden, columns), flat=starts_E is not None),
        [
            Operand(x_ECD, wide_row),
            Operand(d_y_ECD, wide_row),
            *(Operand(a, row) for a in (d_gate_ECF, d_up_ECF, hidden_ECF)),
        ],
        [d_up, d_up, Operand(output_like(x_ECD, experts, hidden, width), down)],
        vmem_bytes=sizes.vmem_bytes,
        interpret=interpret,
        scratch=[] if one_pass else totals,
    )
    d_w_gate_EDF, d_w_up_EDF, d_w_down_EFD = results
    return d_w_gate_EDF, d_w_up_EDF, d_w_down_EFD

"""What the TPU kernels share: the grid along a list of tiles, the blocks of operands, and slabs of live rows."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from anyexperts_jax.ops.expert_mlp.tiles import TileList
from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes

Ref = Any  # a reference to a block in VMEM, or to scalars in SMEM

_CHUNKS = (64, 32, 16)
_MOST_CHUNKS = 16  # per block: each chunk is a branch in the program
_LISTS = ("expert", "block", "source_expert", "source_block", "rows", "opens", "closes")  # fields prefetched to SMEM


class Block(NamedTuple):
    """The part of an operand that a kernel sees at one step: [rows, columns] of one expert's matrix.

    `of` says which part: "tile" for the step's rows, "expert" for the whole matrix. `along` is the side along which the
    outer grid axis moves, if any.
    """

    of: str
    rows: int
    columns: int
    along: str | None = None


class Operand(NamedTuple):
    array: Any  # an Array, or the ShapeDtypeStruct of an output
    block: Block


class Step(NamedTuple):
    """A grid step as its kernel sees it: the live rows of its tile, and whether its expert starts or ends here."""

    live: Any
    opens: Any
    closes: Any


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of a call: the first `steps` of `tiles`, below an outer axis of `outer` steps. Each outer step visits
    all tiles (for another block of columns) or, if `split`, its own part of them (on another core). If `flat`, the rows
    of all experts lie in one buffer [1, R, D]."""

    tiles: TileList
    steps: Int[Array, ""] | int
    outer: int = 1
    split: bool = False
    flat: bool = False


Kernel = Callable[[Step, Sequence[Ref], Sequence[Ref], Sequence[Ref]], None]


def run_kernel(
    kernel: Kernel,
    name: str,
    grid: Grid,
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    *,
    vmem_bytes: int,
    interpret: Any,
    scratch: Sequence[Any] = (),
) -> list[Array]:
    """Runs `kernel(step, input refs, output refs, scratch refs)` along the grid.

    Output tiles that the grid does not reach are undefined, and so are the rows of an input tile after the live ones.
    """
    steps = -(-grid.steps // grid.outer) if grid.split else grid.steps
    # Scalars are prefetched to SMEM, because the index maps of the pipeline read the list of tiles.
    scalars = [*(getattr(grid.tiles, name) for name in _LISTS), jnp.asarray(steps, jnp.int32).reshape(1)]
    chunks = [chunk_rows(operand.block, *operand.array.shape[1:]) for operand in inputs]
    copied = [(i, operand) for i, operand in enumerate(inputs) if chunks[i]]

    def body(*refs: Ref) -> None:
        lists, refs = refs[: len(scalars)], refs[len(scalars) :]
        ends = len(inputs), len(inputs) + len(outputs), len(inputs) + len(outputs) + len(scratch)
        given, (*buffers, semaphores) = list(refs[: ends[0]]), refs[ends[2] :]
        own = [
            Copied(given[i], buffer, semaphores.at[n], operand.block, chunks[i], grid.flat)
            for n, ((i, operand), buffer) in enumerate(zip(copied, buffers, strict=True))
        ]
        place = _place(pl.program_id(0), pl.program_id(1), lists, grid.split)
        step = Step(*(_read(lists, name, place) for name in ("rows", "opens", "closes")))
        for (i, _), ref in zip(copied, _fetch_ahead(own, lists, place), strict=True):
            given[i] = ref
        kernel(step, given, refs[ends[0] : ends[1]], refs[ends[1] : ends[2]])

    results = pl.pallas_call(
        body,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(grid.outer, steps),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY) if chunk else _spec(operand.block, grid, "source_")
                for operand, chunk in zip(inputs, chunks, strict=True)
            ],
            out_specs=[_spec(operand.block, grid, "") for operand in outputs],
            scratch_shapes=[
                *scratch,
                *(pltpu.VMEM((2, op.block.rows, op.block.columns), op.array.dtype) for _, op in copied),
                pltpu.SemaphoreType.DMA((max(len(copied), 1), 2)),
            ],
        ),
        out_shape=[operand.array for operand in outputs],
        # Cores may share the outer axis. The inner one must run in order: accumulators and buffers carry over.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpret,
    )(*scalars, *(operand.array for operand in inputs))
    return list(results)


def chunk_rows(block: Block, capacity: int, width: int) -> int:
    """Rows per chunk of an input [E, capacity, width] of which the kernel copies live rows only. 0 if the sizes are not
    multiples of a chunk; Pallas's pipeline then copies whole tiles."""
    if block.of != "tile" or width % block.columns:
        return 0
    fitting = [rows for rows in _CHUNKS if block.rows % rows == 0 and capacity % rows == 0]
    return fitting[0] if fitting and block.rows <= _MOST_CHUNKS * fitting[0] else 0


class Copied(NamedTuple):
    """An operand whose live rows the kernel copies itself, into one of two buffers while it works on the other."""

    source: Ref
    buffers: Ref
    semaphores: Ref
    block: Block
    chunk: int
    flat: bool

    def for_each_chunk(self, place: Any, slot: Any, lists: Sequence[Ref], act: Callable[[Any], None]) -> None:
        """Calls `act` on the copy of every chunk that holds live rows of the tile at `place`.

        Waiting needs the same descriptors as starting, so both go through here.
        """
        expert, block_at, live = (_read(lists, name, place) for name in ("source_expert", "source_block", "rows"))
        along = self.block.along == "columns"
        columns = pl.ds(pl.program_id(0) * self.block.columns, self.block.columns) if along else slice(None)
        for start in range(0, self.block.rows, self.chunk):
            rows = pl.ds(pl.multiple_of(block_at * self.block.rows + start, self.chunk), self.chunk)
            source, target = (
                self.source.at[0 if self.flat else expert, rows, columns],
                self.buffers.at[slot, pl.ds(start, self.chunk)],
            )
            copy = pltpu.make_async_copy(source, target, self.semaphores.at[slot])
            pl.when(start < live)(functools.partial(act, copy))


def _fetch_ahead(operands: Sequence[Copied], lists: Sequence[Ref], place: Any) -> list[Ref]:
    """Starts copying the next step's tile of each operand, then waits for this step's and returns it."""
    step = pl.program_id(1)
    slot = lax.rem(step, 2)

    def start(at: Any, into: Any) -> None:
        for operand in operands:
            operand.for_each_chunk(at, into, lists, lambda copy: copy.start())

    pl.when(step == 0)(lambda: start(place, slot))
    pl.when(step + 1 < lists[-1][0])(lambda: start(place + 1, 1 - slot))
    for operand in operands:
        operand.for_each_chunk(place, slot, lists, lambda copy: copy.wait())
    return [operand.buffers.at[slot] for operand in operands]


def _place(outer: Any, step: Any, lists: Sequence[Ref], split: bool) -> Any:
    """The index of a step in the list of tiles."""
    return outer * lists[-1][0] + step if split else step


def _read(lists: Sequence[Ref], name: str, place: Any) -> Any:
    return lists[_LISTS.index(name)][place]


def _spec(block: Block, grid: Grid, side: str) -> pl.BlockSpec:
    def index(outer: Any, step: Any, *lists: Ref) -> tuple[Any, ...]:
        place = _place(outer, step, lists, grid.split)
        row = _read(lists, side + "block", place) if block.of == "tile" else 0
        row = outer if block.along == "rows" else row
        matrix = 0 if grid.flat and block.of == "tile" else _read(lists, side + "expert", place)
        return matrix, row, outer if block.along == "columns" else 0

    return pl.BlockSpec((None, block.rows, block.columns), index)


@dataclasses.dataclass(frozen=True)
class Slab:
    """Rows of a tile that go through the matmuls together. Rows from `live` on are dead; all of these are among the
    last `step` rows."""

    start: Any
    size: int
    step: int
    live: Any

    @property
    def rows(self) -> Any:
        return pl.ds(self.start, self.size)

    def mask(self, value: Any) -> Any:
        """Sets the dead rows of `value` to zero. Only the last `step` rows can be dead, so only these are masked."""
        head = self.size - self.step
        row = lax.broadcasted_iota(jnp.int32, (self.step, value.shape[1]), 0) + head
        tail = jnp.where(row < self.live, value[head:], jnp.zeros((), value.dtype))
        return jnp.concatenate([value[:head], tail]) if head else tail


def for_each_slab(live: Any, sizes: KernelSizes, body: Callable[[Slab], None]) -> None:
    """Runs `body` on slabs that cover the first `live` rows of a tile and fewer than `sizes.step` rows more.

    The shapes of a matmul are static, so the last slab of a tile is one branch for each multiple of `sizes.step`.
    """
    start: Any = 0
    rest, largest = live, sizes.slab
    if sizes.block > sizes.slab:
        full = (live + sizes.step - 1) // sizes.slab  # the slabs for which no smaller size is enough

        def run(i: Any, _: None) -> None:
            body(Slab(pl.multiple_of(i * sizes.slab, sizes.slab), sizes.slab, sizes.step, live - i * sizes.slab))

        lax.fori_loop(0, full, run, None)
        start, rest = pl.multiple_of(full * sizes.slab, sizes.slab), live - full * sizes.slab
        largest = sizes.slab - sizes.step
    for size in range(sizes.step, largest + 1, sizes.step):
        slab = Slab(start, size, sizes.step, rest)
        pl.when((rest > size - sizes.step) & (rest <= size))(functools.partial(body, slab))


def zero_dead(ref: Ref, live: Any, sizes: KernelSizes) -> None:
    """Zeroes the rows of a tile that no slab covers."""
    for start in range(0, sizes.block, sizes.step):

        @pl.when(start >= live)
        def _(rows: slice = slice(start, start + sizes.step)) -> None:
            ref[rows, :] = jnp.zeros((sizes.step, ref.shape[1]), ref.dtype)


def output_like(array: Array, *shape: int) -> jax.ShapeDtypeStruct:
    """An output of this shape with the array's dtype."""
    return jax.ShapeDtypeStruct(shape, array.dtype)

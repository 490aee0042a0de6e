"""What the TPU kernels share: the grid along a list of tiles, blocks of operands, passes over a tile's live rows."""

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
_MOST_CHUNKS = 16  # of a block: each is a branch of the program
_LISTS = ("expert", "block", "source_expert", "source_block", "rows", "opens", "closes")  # of TileList, prefetched


class Block(NamedTuple):
    """What a kernel sees of an operand at one step: [rows, columns] of one expert's matrix.

    `of` says where: "tile", the step's rows; "expert", the whole matrix. `along` is the side that the outer grid axis
    walks along, if any.
    """

    of: str
    rows: int
    columns: int
    along: str | None = None


class Operand(NamedTuple):
    array: Any  # an Array, or the ShapeDtypeStruct of an output
    block: Block


class Step(NamedTuple):
    """A grid step as its kernel sees it: the live rows of its tile, and whether its expert begins or ends here."""

    live: Any
    opens: Any
    closes: Any


@dataclasses.dataclass(frozen=True)
class Grid:
    """Steps of a call. `tiles` are visited up to `steps`; the outer axis has `outer` steps, each of which goes through
    all tiles (columns) or, where `split`, through its part of them (cores). Where `flat`, the rows of all experts lie
    in one buffer [1, R, D]."""

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

    Outputs of tiles that the grid does not reach hold anything, as do rows of an input past the live ones.
    """
    steps = -(-grid.steps // grid.outer) if grid.split else grid.steps
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpret,
    )(*scalars, *(operand.array for operand in inputs))
    return list(results)


def chunk_rows(block: Block, capacity: int, width: int) -> int:
    """Rows of an input [E, capacity, width] that are copied together where no more of a tile is copied than its live
    rows; 0 where the pipeline copies a tile whole, its sizes being no multiple of a chunk's."""
    if block.of != "tile" or width % block.columns:
        return 0
    fitting = [rows for rows in _CHUNKS if block.rows % rows == 0 and capacity % rows == 0]
    return fitting[0] if fitting and block.rows <= _MOST_CHUNKS * fitting[0] else 0


class Copied(NamedTuple):
    """An operand whose live rows a kernel copies by itself, into one of two buffers while it works on the other."""

    source: Ref
    buffers: Ref
    semaphores: Ref
    block: Block
    chunk: int
    flat: bool

    def each(self, place: Any, slot: Any, lists: Sequence[Ref], act: Callable[[Any], None]) -> None:
        """Calls `act` on the copy of every chunk that holds a live row of the tile at `place`."""
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
    """This step's tile of each, once it is here; the next step's is on its way."""
    step = pl.program_id(1)
    slot = lax.rem(step, 2)

    def start(at: Any, into: Any) -> None:
        for operand in operands:
            operand.each(at, into, lists, lambda copy: copy.start())

    pl.when(step == 0)(lambda: start(place, slot))
    pl.when(step + 1 < lists[-1][0])(lambda: start(place + 1, 1 - slot))
    for operand in operands:
        operand.each(place, slot, lists, lambda copy: copy.wait())
    return [operand.buffers.at[slot] for operand in operands]


def _place(outer: Any, step: Any, lists: Sequence[Ref], split: bool) -> Any:
    """A step's index in the list of tiles."""
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
    """Rows of a tile that go through the matmuls together. Those from `live` on are dead; all such are among the last
    `step`."""

    start: Any
    size: int
    step: int
    live: Any

    @property
    def rows(self) -> Any:
        return pl.ds(self.start, self.size)

    def mask(self, value: Any) -> Any:
        """`value` with zeros in the dead rows."""
        head = self.size - self.step
        row = lax.broadcasted_iota(jnp.int32, (self.step, value.shape[1]), 0) + head
        tail = jnp.where(row < self.live, value[head:], jnp.zeros((), value.dtype))
        return jnp.concatenate([value[:head], tail]) if head else tail


def for_each_slab(live: Any, sizes: KernelSizes, body: Callable[[Slab], None]) -> None:
    """Runs `body` on slabs that cover the first `live` rows of a tile, and less than `sizes.step` rows more."""
    start: Any = 0
    rest, largest = live, sizes.slab
    if sizes.block > sizes.slab:
        full = (live + sizes.step - 1) // sizes.slab  # those that no smaller pass will do for

        def run(i: Any, _: None) -> None:
            body(Slab(pl.multiple_of(i * sizes.slab, sizes.slab), sizes.slab, sizes.step, live - i * sizes.slab))

        lax.fori_loop(0, full, run, None)
        start, rest = pl.multiple_of(full * sizes.slab, sizes.slab), live - full * sizes.slab
        largest = sizes.slab - sizes.step
    for size in range(sizes.step, largest + 1, sizes.step):
        slab = Slab(start, size, sizes.step, rest)
        pl.when((rest > size - sizes.step) & (rest <= size))(functools.partial(body, slab))


def zero_dead(ref: Ref, live: Any, sizes: KernelSizes) -> None:
    """Zeros in the rows of a tile that no slab reached."""
    for start in range(0, sizes.block, sizes.step):

        @pl.when(start >= live)
        def _(rows: slice = slice(start, start + sizes.step)) -> None:
            ref[rows, :] = jnp.zeros((sizes.step, ref.shape[1]), ref.dtype)


def like(array: Array, *shape: int) -> jax.ShapeDtypeStruct:
    """An output of array's dtype."""
    return jax.ShapeDtypeStruct(shape, array.dtype)

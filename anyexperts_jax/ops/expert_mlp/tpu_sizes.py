"""Block sizes of the TPU kernels: their parameters, the VMEM they need, and a heuristic, which takes the first of a
list of candidates that fits. `tpu_size_table` has better sizes for the shapes it covers."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.hardware import TpuLimits
from anyexperts_jax.core.rounding import round_up

KERNELS = ("forward", "backward", "weights")


@dataclasses.dataclass(frozen=True)
class KernelSizes:
    """Sizes of one kernel.

    block: rows of a tile, the unit of fetching and skipping; a multiple of `step`.
    slab: rows that go through the matmuls together, at most `block`.
    step: the last slab of a tile has the least multiple of `step` rows that covers the rest.
    columns: columns of F (or D) whose weights are resident at a time; None keeps an expert's weights whole, in one
      fused kernel.
    inner: columns of F that the second forward matmul contracts at a time; None is all of them. Columns that do not
      fill a tile of the matrix unit can then come last, and the others need not wait for the end of the first matmul.
    """

    block: int
    slab: int
    step: int
    columns: int | None = None
    inner: int | None = None

    def __post_init__(self) -> None:
        require(
            self.step % 8 == 0 and self.slab % self.step == 0 and self.block % self.step == 0,
            f"block={self.block} and slab={self.slab} must be multiples of step={self.step}, that one of 8",
        )
        require(self.slab <= self.block, f"slab={self.slab} is more than block={self.block}")
        for name, width in (("columns", self.columns), ("inner", self.inner)):
            require(width is None or (width > 0 and width % 128 == 0), f"{name}={width} must be a multiple of 128")


@dataclasses.dataclass(frozen=True)
class TpuSizes:
    """Sizes of the three kernels: y; the gradients of x, gate and up; the gradients of the weights."""

    forward: KernelSizes
    backward: KernelSizes
    weights: KernelSizes
    cores: int
    vmem_bytes: int


class Shape(NamedTuple):
    """What sizes are chosen by: C, D, F and the bytes of an element."""

    capacity: int
    width: int
    hidden: int
    itemsize: int


def choose_sizes(chip: TpuLimits, shape: Shape) -> TpuSizes:
    """Sizes for a shape.

    One fused kernel if the weights of two experts fit in VMEM, because the next expert's are fetched while one
    computes; otherwise kernels that hold as many columns of the weights as fit.

    Raises:
      UserError: if not even 128 columns fit.
    """
    budget = block_budget(chip)
    both = {name: _first_fit(name, _row_candidates(shape), budget, shape) for name in ("forward", "backward")}
    weights = _first_fit("weights", _weights_candidates(chip, shape), budget, shape)
    return TpuSizes(**both, weights=weights, cores=chip.cores, vmem_bytes=chip.vmem_limit)


def block_budget(chip: TpuLimits) -> float:
    """Bytes of VMEM available for blocks and scratch."""
    return _SHARE_FOR_BLOCKS * chip.vmem_bytes


def kernel_bytes(kernel: str, shape: Shape, sizes: KernelSizes) -> int:
    """VMEM of a kernel's double-buffered blocks and of its scratch; of the larger kernel if there are two."""
    count = {"forward": _forward_bytes, "backward": _backward_bytes, "weights": _weights_bytes}[kernel]
    return count(shape, sizes)


_SHARE_FOR_BLOCKS = 0.75  # of VMEM; the compiler keeps the values in flight in the rest
_SLAB = 256
_STEP = 64  # half a step per expert is wasted on average; smaller steps mean more branches
_SUM_STEP = 128  # for the weight gradients, which contract over rows: the matrix unit takes 128 rows at a time
_BLOCKS = (512, 256, 128)


def _row_candidates(shape: Shape) -> Iterator[KernelSizes]:
    step = min(_STEP, round_up(shape.capacity, 16))
    for columns in (None, *_column_counts(max(shape.width, shape.hidden))):
        for rows in _BLOCKS:
            block = min(rows, round_up(shape.capacity, step))
            yield KernelSizes(block, _SLAB if block > _SLAB and _SLAB % step == 0 else block, step, columns)


def _weights_candidates(chip: TpuLimits, shape: Shape) -> Iterator[KernelSizes]:
    """All columns first, or half of them if two cores share the work."""
    step = min(_SUM_STEP, round_up(shape.capacity, 16))
    for columns in _column_counts(shape.hidden // chip.cores):
        for rows in _BLOCKS:
            block = min(rows, round_up(shape.capacity, step))
            yield KernelSizes(block, _SLAB if block == _BLOCKS[0] else block, step, columns)


def _column_counts(most: int) -> Iterator[int]:
    """Multiples of 128 from the least that covers `most` downwards, each about half of the one before."""
    columns = round_up(most, 128)
    while columns > 128:
        yield columns
        columns = round_up(columns // 2, 128)
    yield 128


def _first_fit(name: str, candidates: Iterable[KernelSizes], budget: float, shape: Shape) -> KernelSizes:
    least = None
    for sizes in candidates:
        least = kernel_bytes(name, shape, sizes)
        if least <= budget:
            return sizes
    raise UserError(
        f"{name}: D={shape.width}, F={shape.hidden} at {shape.itemsize} bytes needs {least} bytes of VMEM and "
        f"{int(budget)} are free; use implementation='xla'"
    )


def _forward_bytes(shape: Shape, sizes: KernelSizes) -> int:
    _, D, F, itemsize = shape
    if sizes.columns is None:
        return itemsize * (2 * 3 * D * F + 2 * sizes.block * (2 * D + 2 * F) + sizes.block * F)
    hidden = 2 * D * sizes.columns + sizes.block * (D + 3 * sizes.columns)
    down = F * sizes.columns + sizes.block * (F + sizes.columns)
    return 2 * itemsize * max(hidden, down)


def _backward_bytes(shape: Shape, sizes: KernelSizes) -> int:
    _, D, F, itemsize = shape
    rows = sizes.block * (max(D, 2 * F) + 2 * D + 3 * F)
    if sizes.columns is None:
        return 2 * itemsize * (3 * D * F + rows)
    hidden = 3 * D * sizes.columns + sizes.block * (2 * D + 5 * sizes.columns)
    back = 2 * F * sizes.columns + sizes.block * (2 * F + sizes.columns)
    return 2 * itemsize * max(hidden, back)


def _weights_bytes(shape: Shape, sizes: KernelSizes) -> int:
    C, D, _, itemsize = shape
    columns = sizes.columns or shape.hidden
    totals = 0 if sizes.block == sizes.slab and sizes.block >= C else 4 * 3 * D * columns
    return totals + 2 * itemsize * (3 * D * columns + sizes.block * (2 * D + 3 * columns))

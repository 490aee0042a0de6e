"""Tiles of the six GPU kernels: their parameters, the shared memory they need, and a heuristic that stays well below
the limits of any GPU. `gpu_tile_table` has better tiles for the shapes it covers."""

import dataclasses
from typing import Any, NamedTuple

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.hardware import GpuLimits, gpu_limits


@dataclasses.dataclass(frozen=True)
class TritonTile:
    """How a Triton kernel tiles its matmul [m, k] x [k, n]; powers of two, 16 or more.

    stages: pipeline depth; each stage holds a tile of both operands in shared memory.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        good = all(size >= 16 and _is_power(size) for size in (self.m, self.n, self.k))
        require(good, f"m={self.m}, n={self.n} and k={self.k} must be powers of two, 16 or more")
        require(self.warps >= 1 and _is_power(self.warps), f"warps={self.warps} must be a power of two")
        require(self.stages >= 1, f"stages={self.stages} must be >= 1")


@dataclasses.dataclass(frozen=True)
class MosaicTile:
    """How a Mosaic kernel tiles its matmul [m, k] x [k, n]: m a multiple of 128, n and k of 64.

    stages: pipeline depth; each stage holds its tiles in shared memory.
    """

    m: int
    n: int
    k: int
    stages: int

    def __post_init__(self) -> None:
        good = self.m > 0 and self.m % 128 == 0 and all(size > 0 and size % 64 == 0 for size in (self.n, self.k))
        require(good, f"m={self.m} must be a multiple of 128, n={self.n} and k={self.k} of 64")
        require(self.stages >= 1, f"stages={self.stages} must be >= 1")


Tile = TritonTile | MosaicTile
TILES: dict[str, type[Tile]] = {"pallas_triton": TritonTile, "pallas_gpu": MosaicTile}


class Tiles(NamedTuple):
    """One tile per kernel, all of the same kind."""

    gate_up: Any
    down: Any
    d_gate_up: Any
    d_x: Any
    d_w_gate_up: Any
    d_w_down: Any


class GpuShape(NamedTuple):
    """What tiles are chosen by: D, F and the bytes of an element."""

    width: int
    hidden: int
    itemsize: int


class _Use(NamedTuple):
    """The tiles that a kernel holds at a time."""

    left: int  # operands [m, k] per step
    right: int  # operands [k, n] per step
    sums: int  # accumulators [m, n] in float32
    read_last: int  # operands [m, n] of the epilogue, read when the sums are complete
    columns: str  # the dimension that n tiles


_USES = Tiles(
    gate_up=_Use(1, 2, 2, 0, "hidden"),
    down=_Use(1, 1, 1, 0, "width"),
    d_gate_up=_Use(1, 1, 1, 2, "hidden"),
    d_x=_Use(2, 2, 1, 0, "width"),
    d_w_gate_up=_Use(1, 2, 2, 0, "hidden"),
    d_w_down=_Use(1, 1, 1, 0, "width"),
)
_M = 128  # the same for all kernels, because it decides the block at which experts' rows begin
_WARPS = 8
_THREAD_VALUES = 64  # accumulator (or epilogue) values per thread: more than that would spill its 255 registers
_MOST_STAGES = {TritonTile: 4, MosaicTile: 5}
_BARRIER_BYTES = 1024  # a generous bound on what Mosaic's barriers take


def choose_tiles(implementation: str, gpu: GpuLimits, shape: GpuShape) -> Tiles:
    """Tiles for any shape: few enough accumulators per thread that nothing spills, and as many stages as fit in the
    shared memory of Hopper, or elsewhere of the smallest GPU. They are no wider than the shape.

    Args:
      implementation: "pallas_triton" or "pallas_gpu".
    """
    choose = _triton_tile if TILES[implementation] is TritonTile else _mosaic_tile
    return Tiles(*(choose(name, gpu, shape) for name in Tiles._fields))


def shared_bytes(kernel: str, tile: Tile, itemsize: int) -> int:
    """An upper bound on the shared memory of a kernel's thread block."""
    use: _Use = getattr(_USES, kernel)
    steps = tile.stages * itemsize * tile.k * (use.left * tile.m + use.right * tile.n)
    if isinstance(tile, TritonTile):
        return steps  # Triton keeps the result and the epilogue's operands in registers
    return steps + itemsize * (1 + use.read_last) * tile.m * tile.n + _BARRIER_BYTES


def _triton_tile(kernel: str, gpu: GpuLimits, shape: GpuShape) -> TritonTile:
    use: _Use = getattr(_USES, kernel)
    most = _THREAD_VALUES * 32 * _WARPS // (_M * max(use.sums, use.read_last))
    k = (128 if gpu.wgmma else 64) // shape.itemsize
    tile = TritonTile(_M, _columns(use, shape, 16, most), k, _WARPS, 1)
    # Only Hopper gets its own limit. Elsewhere the smallest GPU's limit makes one choice valid for all of them.
    budget = gpu.shared_bytes if gpu.wgmma else gpu_limits(None).shared_bytes
    return _with_most_stages(kernel, tile, budget, shape)


def _mosaic_tile(kernel: str, gpu: GpuLimits, shape: GpuShape) -> MosaicTile:
    tile = MosaicTile(_M, _columns(getattr(_USES, kernel), shape, 64, 128), 64, 1)
    return _with_most_stages(kernel, tile, gpu.shared_bytes, shape)


def _columns(use: _Use, shape: GpuShape, least: int, most: int) -> int:
    """The least power of two that covers the result's columns, within bounds."""
    columns = int(getattr(shape, use.columns))
    return min(max(1 << (columns - 1).bit_length(), least), most)


def _with_most_stages(kernel: str, tile: Any, budget: int, shape: GpuShape) -> Any:
    """`tile` with as many stages as fit in the budget of shared memory."""
    tiles = [dataclasses.replace(tile, stages=stages) for stages in range(1, _MOST_STAGES[type(tile)] + 1)]
    return [each for each in tiles if shared_bytes(kernel, each, shape.itemsize) <= budget][-1]


def _is_power(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0

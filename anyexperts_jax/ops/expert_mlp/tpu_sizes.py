"""Block sizes of the TPU kernels: data for the shapes we studied, a heuristic by VMEM for all others."""

import dataclasses
import math
from typing import NamedTuple

from anyexperts_jax.core.errors import require

_MIB = 2**20


class Chip(NamedTuple):
    """What a choice of sizes needs to know of a TPU."""

    vmem_bytes: int  # of one core
    cores: int  # that share a device: each takes a part of every kernel


CHIPS = {
    "v5e": Chip(128 * _MIB, 1),
    "v5p": Chip(64 * _MIB, 2),
    "v6e": Chip(128 * _MIB, 1),
    "tpu7x": Chip(64 * _MIB, 1),
}
UNKNOWN_CHIP = Chip(16 * _MIB, 1)  # as little as any TPU has
_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"} | {
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class KernelSizes:
    """Sizes of one kernel.

    block: rows of a tile, the unit of fetching and skipping; a multiple of `step`.
    slab: rows of one pass through the matmuls, at most `block`.
    step: the last pass of a tile takes the fewest multiple of `step` rows that will do.
    columns: columns of F (or D) whose weights are kept at a time; None keeps an expert's weights whole and fuses.
    """

    block: int
    slab: int
    step: int
    columns: int | None = None

    def __post_init__(self) -> None:
        require(
            self.step % 8 == 0 and self.slab % self.step == 0 and self.block % self.step == 0,
            f"block={self.block} and slab={self.slab} must be multiples of step={self.step}, that one of 8",
        )
        require(self.slab <= self.block, f"slab={self.slab} is more than block={self.block}")
        require(self.columns is None or self.columns % 128 == 0, f"columns={self.columns} must be a multiple of 128")


@dataclasses.dataclass(frozen=True)
class TpuSizes:
    """Sizes of the three kernels: y; the gradients of x and of gate and up; the gradients of the weights."""

    forward: KernelSizes
    backward: KernelSizes
    weights: KernelSizes
    cores: int
    vmem_bytes: int

"""Block sizes that were tuned offline, by chip and class of shape. Other shapes get the sizes of the heuristic.

experiments/bench/tune.py writes the table, tpu_sizes.json. Nothing is tuned at run time.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Iterator
from typing import Any

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.hardware import TpuLimits, tpus
from anyexperts_jax.ops.expert_mlp.size_table import parse_entries
from anyexperts_jax.ops.expert_mlp.tpu_sizes import (
    KERNELS,
    KernelSizes,
    Shape,
    TpuSizes,
    block_budget,
    choose_sizes,
    kernel_bytes,
)

FILE = "tpu_sizes.json"
_REMEDY = "write it anew with `python -m experiments.bench.tune`"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Sizes for one class of shapes: this D, F and element size, with a capacity in (over, capacity]."""

    capacity: int
    over: int
    width: int
    hidden: int
    itemsize: int
    forward: KernelSizes
    backward: KernelSizes
    weights: KernelSizes

    @property
    def shape(self) -> Shape:
        """The largest shape of the class."""
        return Shape(self.capacity, self.width, self.hidden, self.itemsize)

    def covers(self, shape: Shape) -> bool:
        return self.over < shape.capacity <= self.capacity and shape[1:] == self.shape[1:]


Table = dict[str, tuple[Entry, ...]]


def sizes_for(chip: TpuLimits, shape: Shape, table: Table | None = None) -> TpuSizes:
    """The sizes of the table, cut to the shape's capacity, if it covers the shape; else those of the heuristic.

    Args:
      table: None is the package's own table.

    Raises:
      UserError: if the package's table is broken or no sizes fit in VMEM.
    """
    entries = (load_table() if table is None else table).get(chip.name, ())
    for entry in entries:
        if entry.covers(shape):
            cut = {kernel: _cut(getattr(entry, kernel), shape.capacity) for kernel in KERNELS}
            return TpuSizes(**cut, cores=chip.cores, vmem_bytes=chip.vmem_limit)
    return choose_sizes(chip, shape)


@functools.cache
def load_table() -> Table:
    """The package's table."""
    return parse_table((importlib.resources.files(__package__) / FILE).read_text())


def parse_table(text: str) -> Table:
    """Parses a table.

    Raises:
      UserError: if it is not JSON, has missing or unknown fields, an unknown chip, or sizes that are invalid or exceed
        the chip's VMEM.
    """
    return parse_entries(text, FILE, "chip", tpus(), _entry, _REMEDY)


def _entry(chip: str, fields: Any) -> Entry:
    try:
        kernels = {kernel: KernelSizes(**fields[kernel]) for kernel in KERNELS}
        entry = Entry(**(fields | kernels))
        too_much = [f"{kernel} takes {taken}" for kernel, taken, fits in _bytes(chip, entry) if not fits]
    except (TypeError, KeyError, UserError) as error:
        raise UserError(f"{FILE}: an entry of {chip} is broken ({error}): {fields}; {_REMEDY}") from error
    require(
        not too_much,
        f"{FILE}: {', '.join(too_much)} bytes of VMEM at {entry.shape} on {chip}, more than "
        f"{int(block_budget(tpus()[chip].limits))}; {_REMEDY}",
    )
    return entry


def _bytes(chip: str, entry: Entry) -> Iterator[tuple[str, int, bool]]:
    for kernel in KERNELS:
        taken = kernel_bytes(kernel, entry.shape, getattr(entry, kernel))
        yield kernel, taken, taken <= block_budget(tpus()[chip].limits)


def _cut(sizes: KernelSizes, capacity: int) -> KernelSizes:
    """The sizes with blocks no larger than the buffer."""
    block = min(sizes.block, -(-capacity // sizes.step) * sizes.step)
    return dataclasses.replace(sizes, block=block, slab=min(sizes.slab, block))

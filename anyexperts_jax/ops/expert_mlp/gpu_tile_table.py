"""Tiles that were tuned offline, by GPU and class of shape. Other shapes get the tiles of the heuristic.

experiments/bench/tune_gpu.py writes the table, gpu_tiles.json. Nothing is tuned at run time.
"""

import dataclasses
import functools
import importlib.resources
from typing import Any

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.hardware import GpuLimits, gpu_limits, gpus
from anyexperts_jax.ops.expert_mlp.gpu_tiles import (
    TILES,
    GpuShape,
    Tiles,
    choose_tiles,
    shared_bytes,
)
from anyexperts_jax.ops.expert_mlp.size_table import parse_entries

FILE = "gpu_tiles.json"
_REMEDY = "write it anew with `python -m experiments.bench.tune_gpu`"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Tiles for one class of shapes: this element size, and D and F at least `narrowest` and multiples of `multiple`.

    source: how the tiles were chosen.
    """

    implementation: str
    itemsize: int
    narrowest: int
    multiple: int
    source: str
    tiles: Tiles

    def covers(self, implementation: str, shape: GpuShape) -> bool:
        widths = (shape.width, shape.hidden)
        wide = min(widths) >= self.narrowest and all(width % self.multiple == 0 for width in widths)
        return wide and (implementation, shape.itemsize) == (self.implementation, self.itemsize)


Table = dict[str, tuple[Entry, ...]]


def tiles_for(implementation: str, kind: str | None, shape: GpuShape, table: Table | None = None) -> Tiles:
    """The tiles of the table if it covers the shape, else those of the heuristic.

    Args:
      implementation: "pallas_triton" or "pallas_gpu".
      kind: the GPU as JAX names it.
      table: None is the package's own table.

    Raises:
      UserError: if the package's table is broken.
    """
    gpu = gpu_limits(kind)
    for entry in (load_table() if table is None else table).get(gpu.name, ()):
        if entry.covers(implementation, shape):
            return entry.tiles
    return choose_tiles(implementation, gpu, shape)


@functools.cache
def load_table() -> Table:
    """The package's table."""
    return parse_table((importlib.resources.files(__package__) / FILE).read_text())


def parse_table(text: str) -> Table:
    """Parses a table.

    Raises:
      UserError: if it is not JSON, has missing or unknown fields, an unknown GPU or implementation, or tiles that are
        invalid or exceed the GPU's shared memory.
    """
    known = {gpu.limits.name: gpu.limits for gpu in gpus().values()}
    return parse_entries(text, FILE, "gpu", known, lambda name, fields: _entry(known[name], fields), _REMEDY)


def _entry(gpu: GpuLimits, fields: Any) -> Entry:
    try:
        kind = TILES[fields["implementation"]]
        tiles = Tiles(**{kernel: kind(**tile) for kernel, tile in fields["tiles"].items()})
        entry = Entry(**(fields | {"tiles": tiles}))
    except (TypeError, KeyError, AttributeError, UserError) as error:
        raise UserError(f"{FILE}: an entry of {gpu.name} is broken ({error}): {fields}; {_REMEDY}") from error
    taken = {kernel: shared_bytes(kernel, tile, entry.itemsize) for kernel, tile in tiles._asdict().items()}
    too_much = [f"{kernel} takes {count}" for kernel, count in taken.items() if count > gpu.shared_bytes]
    require(
        not too_much,
        f"{FILE}: {', '.join(too_much)} bytes of shared memory on {gpu.name}, more than {gpu.shared_bytes}; {_REMEDY}",
    )
    return entry

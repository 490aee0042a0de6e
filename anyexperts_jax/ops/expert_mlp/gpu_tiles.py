"""The six GPU kernels' tiles, whichever module the kernels come from."""

from typing import Any, NamedTuple


class Tiles(NamedTuple):
    """One tile a kernel: a `pallas_triton.Tile` or a `pallas_gpu.Tile`, as the kernels that will run."""

    gate_up: Any
    down: Any
    d_gate_up: Any
    d_x: Any
    d_w_gate_up: Any
    d_w_down: Any

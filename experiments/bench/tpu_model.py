"""Models a kernel's static time on a TPU from the compiler's cycles and copies at the full rate of HBM alone.

A kernel is a list of steps. A step computes for its number of cycles once its blocks have arrived. Copies run one
after the other; each starts when the step that is `ahead` steps before its own begins, and a step's results leave VMEM
when it ends. Launching the kernel, its list of tiles and the small operations around it are not counted for any
library.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from anyexperts_jax.aot.kernels import ExpertShape
from anyexperts_jax.core.hardware import tpus
from anyexperts_jax.ops.expert_mlp.tiles import deal_tiles, list_tiles
from anyexperts_jax.ops.expert_mlp.tpu_grid import Block, chunk_rows
from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes, TpuSizes

ITEMSIZE = 2  # bfloat16
OURS = ("forward", "forward_kept", "backward", "weights")
_OUT_BUFFERS = 2


class Steps(NamedTuple):
    """The costs of one core's steps; each array has an entry per step."""

    cycles: np.ndarray
    read: np.ndarray  # bytes that arrive for the step
    written: np.ndarray  # bytes that leave after it
    ahead: int = 1  # steps between asking for a block and using it
    cores: int = 1  # cores that do the same at the same time and share HBM


def draw_counts(shape: ExpertShape) -> np.ndarray:
    """Draws each expert's rows: multinomial, with lognormal probabilities of sigma 0.3, capped at the capacity."""
    rng = np.random.default_rng(0)
    chances = rng.lognormal(sigma=0.3, size=shape.experts)
    return np.minimum(rng.multinomial(shape.rows, chances / chances.sum()), shape.capacity)


def time_us(steps: Steps, chip: str) -> float:
    """Returns the microseconds until the last step's last copy has left."""
    per_byte = 1e-3 * steps.cores / tpus()[chip].hbm_gbs
    per_cycle = 1e-3 / tpus()[chip].clock_ghz
    arrived, left = [0.0] * len(steps.cycles), [0.0] * len(steps.cycles)
    free = end = 0.0  # when the copies, and when the last step, end

    def fetch(at: int, now: float) -> float:
        if at >= len(arrived):
            return free
        arrived[at] = max(free, now) + float(steps.read[at]) * per_byte if steps.read[at] else now
        return max(free, arrived[at])

    for at in range(steps.ahead):
        free = fetch(at, 0.0)
    for at, cycles in enumerate(steps.cycles):
        start = max(end, arrived[at], left[at - _OUT_BUFFERS] if at >= _OUT_BUFFERS else 0.0)
        free = fetch(at + steps.ahead, start)
        end = start + float(cycles) * per_cycle
        if steps.written[at]:
            free = max(free, end) + float(steps.written[at]) * per_byte
        left[at] = free if steps.written[at] else end
    return max(end, free)


def floor_us(chip: str, shape: ExpertShape, counts: np.ndarray, part: str) -> float:
    """Returns the longer of the matmuls at peak rate and of moving each operand and result once, for live rows only."""
    D, F, rows = shape.width, shape.hidden, int(counts.sum())
    matmuls, matrices = (6, 6) if part == "backward" else (3, 3)
    values = {"forward": 2 * D, "forward_kept": 2 * D + 2 * F, "backward": 3 * D + 2 * F}[part]
    moved = ITEMSIZE * (matrices * D * F * int((counts > 0).sum()) + rows * values)
    return max(2 * matmuls * D * F * rows / tpus()[chip].tflops * 1e-6, moved / tpus()[chip].hbm_gbs * 1e-3)


def own_sizes(call: str, sizes: TpuSizes) -> KernelSizes:
    """Returns the sizes of one of our kernels."""
    return sizes.forward if call.startswith("forward") else getattr(sizes, call)


def our_steps(
    call: str, chip: str, shape: ExpertShape, sizes: TpuSizes, summary: dict[str, Any], counts: np.ndarray
) -> list[Steps]:
    """Returns each core's steps in one of our kernels, from its compiled summary."""
    own, cores = own_sizes(call, sizes), tpus()[chip].cores
    capacity = -(-shape.capacity // 16) * 16  # as `expert_mlp` pads it
    listed = list_tiles(jnp.asarray(counts), capacity, own.block)
    traffic = _traffic(call, shape, own)
    if call == "weights":  # cores share the blocks of columns, and each goes through all tiles
        parts = [[np.asarray(a)[: int(listed.num_touched)] for a in listed[:7]]]
        turns, cores = -(-traffic.turns // cores), min(traffic.turns, cores)
    else:
        dealt, turns = deal_tiles(listed, cores), 1
        parts = [list(part) for part in zip(*(np.split(np.asarray(a), cores) for a in dealt[:7]), strict=True)]
    found = []
    for _, block, source, source_block, rows, _, closes in parts:
        skipped = closes == 1 if call == "weights" else np.ones(len(rows), bool)  # sums are rounded once an expert
        cycles = np.array([pass_cycles(summary, own, int(n)) for n in rows]) + summary["step_cycles"]
        cycles = cycles + summary["skipped_cycles"] * skipped
        height = np.clip(capacity - block * own.block, 0, own.block)
        new_expert, new_block = (np.append(True, a[1:] != a[:-1]) for a in (source, source_block))
        read = new_expert * traffic.read_an_expert
        for width in traffic.read_widths:
            chunk = chunk_rows(Block("tile", own.block, width), capacity, width)
            whole = np.where(new_expert | new_block, height, 0)
            read = read + (-(-rows // chunk) * chunk if chunk else whole) * width * ITEMSIZE
        written = height * traffic.written_a_row + (closes == 1) * traffic.written_an_expert
        found.append(Steps(*(np.tile(a, turns) for a in (cycles, read, written)), cores=cores))
    return found


def longest_us(parts: Sequence[Steps], chip: str) -> float:
    """Returns the time of the slowest core."""
    return max(time_us(part, chip) for part in parts)


def pass_cycles(summary: dict[str, Any], own: KernelSizes, rows: int) -> int:
    """Returns the cycles of the passes over `rows` live rows."""
    passes = [p["cycles"] for p in summary["passes"]]
    looped = own.block > own.slab
    full, rest = divmod(rows, own.slab) if looped else (0, rows)
    if looped and rest > own.slab - own.step:  # nearly a whole slab: one more iteration of the loop
        full, rest = full + 1, 0
    part = -(-rest // own.step)
    return full * passes[-1] + (passes[part - 1] if part else 0)


class _Traffic(NamedTuple):
    read_widths: tuple[int, ...]  # of the rows of each input
    read_an_expert: int  # bytes
    written_a_row: int
    written_an_expert: int
    turns: int = 1  # how often all tiles are read


def _traffic(call: str, shape: ExpertShape, own: KernelSizes) -> _Traffic:
    D, F = shape.width, shape.hidden
    weights = 3 * D * F * ITEMSIZE
    if call == "weights":
        columns = own.columns or F
        return _Traffic((D, D, *(columns,) * 3), 0, 0, 3 * D * columns * ITEMSIZE, -(-F // columns))
    read = (D, F, F) if call == "backward" else (D,)
    written = {"forward": D, "forward_kept": D + 2 * F, "backward": D + 3 * F}[call]
    return _Traffic(read, weights, written * ITEMSIZE, 0)

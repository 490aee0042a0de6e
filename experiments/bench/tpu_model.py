"""Static time of a kernel on a TPU: cycles from the compiler, copies at the full rate of HBM, nothing else.

A kernel is a list of steps. A step computes for so many cycles once its blocks have come; copies go one after the
other, each asked for when the step that precedes its own by `ahead` begins, and what a step wrote leaves VMEM when it
ends. Launching the kernel, its list of tiles and the small operations around it are not counted, for anyone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from anyexperts_jax.aot.kernels import ExpertShape
from anyexperts_jax.ops.expert_mlp.tiles import list_tiles
from anyexperts_jax.ops.expert_mlp.tpu_sizes import CHIPS, KernelSizes, TpuSizes

ITEMSIZE = 2  # bfloat16
OURS = ("forward", "forward_kept", "backward", "weights")
_OUT_BUFFERS = 2


class Speed(NamedTuple):
    """Public figures of a device."""

    ghz: float
    hbm_gb_per_s: float
    tflop_per_s: float  # bfloat16


SPEEDS = {
    "v5e": Speed(1.5, 819, 197),
    "v5p": Speed(1.75, 2765, 459),
    "v6e": Speed(1.75, 1640, 918),
    "tpu7x": Speed(2.2, 3690, 1153),  # half a chip: each of its cores is a device
}


class Steps(NamedTuple):
    """What the steps of one core cost, an entry each."""

    cycles: np.ndarray
    read: np.ndarray  # bytes that come for the step
    written: np.ndarray  # bytes that leave after it
    ahead: int = 1  # steps between asking for a block and using it
    cores: int = 1  # that do the like at the same time and share HBM


def draw_counts(shape: ExpertShape) -> np.ndarray:
    """Rows of each expert: one multinomial draw, its chances lognormal with sigma 0.3; no more than a buffer holds."""
    rng = np.random.default_rng(0)
    chances = rng.lognormal(sigma=0.3, size=shape.experts)
    return np.minimum(rng.multinomial(shape.rows, chances / chances.sum()), shape.capacity)


def time_us(steps: Steps, chip: str) -> float:
    """Microseconds until the last copy of the last step has left."""
    per_byte = 1e-3 * steps.cores / SPEEDS[chip].hbm_gb_per_s
    per_cycle = 1e-3 / SPEEDS[chip].ghz
    arrived, left = [0.0] * len(steps.cycles), [0.0] * len(steps.cycles)
    free = end = 0.0  # of the copies, of the last step

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
    """The longer of the matmuls at the peak rate and of every operand and result moved once, for live rows alone."""
    D, F, rows = shape.width, shape.hidden, int(counts.sum())
    matmuls, matrices = (6, 6) if part == "backward" else (3, 3)
    values = {"forward": 2 * D, "forward_kept": 2 * D + 2 * F, "backward": 3 * D + 2 * F}[part]
    moved = ITEMSIZE * (matrices * D * F * int((counts > 0).sum()) + rows * values)
    return max(2 * matmuls * D * F * rows / SPEEDS[chip].tflop_per_s * 1e-6, moved / SPEEDS[chip].hbm_gb_per_s * 1e-3)


def own_sizes(call: str, sizes: TpuSizes) -> KernelSizes:
    """The sizes of one of our kernels."""
    return sizes.forward if call.startswith("forward") else getattr(sizes, call)


def our_steps(
    call: str, chip: str, shape: ExpertShape, sizes: TpuSizes, summary: dict[str, Any], counts: np.ndarray
) -> list[Steps]:
    """The steps of each core in one of our kernels, from its compiled summary."""
    own, cores = own_sizes(call, sizes), CHIPS[chip].cores
    listed = list_tiles(jnp.asarray(counts), shape.capacity, own.block)
    stop = int(listed.num_touched) if call == "weights" else listed.rows.size - 1
    rows, block, source, closes = (
        np.asarray(a)[:stop] for a in (listed.rows, listed.block, listed.source_expert, listed.closes)
    )
    row_in, expert_in, row_out, expert_out, turns = _traffic(call, shape, own)
    skipped = closes == 1 if call == "weights" else np.ones(stop, bool)  # the sums are rounded once an expert
    cycles = np.array([pass_cycles(summary, own, int(n)) for n in rows]) + summary["step_cycles"]
    cycles = cycles + summary["skipped_cycles"] * skipped
    height = np.clip(shape.capacity - block * own.block, 0, own.block)  # copies move a tile's block whole
    if call == "weights":  # cores share the parts of the columns, each going through all tiles
        places, cores = [np.tile(np.arange(stop), -(-turns // cores))], min(turns, cores)
    else:
        places = np.array_split(np.arange(stop), cores)
    found = []
    for part in places:
        new_expert = np.append(True, source[part][1:] != source[part][:-1])
        read = np.where(rows[part] > 0, height[part] * row_in, 0) + new_expert * expert_in
        written = height[part] * row_out + (closes[part] == 1) * expert_out
        found.append(Steps(cycles[part], read, written, cores=cores))
    return found


def longest_us(parts: Sequence[Steps], chip: str) -> float:
    """Time of the slowest core."""
    return max(time_us(part, chip) for part in parts)


def pass_cycles(summary: dict[str, Any], own: KernelSizes, rows: int) -> int:
    """Cycles of the passes over `rows` live rows."""
    passes = [p["cycles"] for p in summary["passes"]]
    looped = own.block > own.slab
    full, rest = divmod(rows, own.slab) if looped else (0, rows)
    if looped and rest > own.slab - own.step:  # nearly whole: one more turn of the loop
        full, rest = full + 1, 0
    part = -(-rest // own.step)
    return full * passes[-1] + (passes[part - 1] if part else 0)


def _traffic(call: str, shape: ExpertShape, own: KernelSizes) -> tuple[int, int, int, int, int]:
    """(bytes read a row, read an expert, written a row, written an expert, times the tiles are gone through)."""
    D, F = shape.width, shape.hidden
    weights = 3 * D * F * ITEMSIZE
    if call == "weights":
        columns = own.columns or F
        return (2 * D + 3 * columns) * ITEMSIZE, 0, 0, 3 * D * columns * ITEMSIZE, -(-F // columns)
    values_in = D + 2 * F if call == "backward" else D
    values_out = {"forward": D, "forward_kept": D + 2 * F, "backward": D + 3 * F}[call]
    return values_in * ITEMSIZE, weights, values_out * ITEMSIZE, 0, 1

"""Static time of the expert kernels on TPUs that are not here: cycles from the compiler, copies from the block sizes.

    python experiments/bench/kernels.py --out experiments/results --golden tests/golden/tpu_kernels.json

A step takes the longer of its cycles and of the copies that run beside it: what the next step reads, what the last
one wrote, at the full rate of HBM. Nothing else is modelled, and nothing here was run on a device.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

from anyexperts_jax.aot import kernels, report, topology
from anyexperts_jax.ops.expert_mlp import tiles
from anyexperts_jax.ops.expert_mlp.tpu_sizes import CHIPS, KernelSizes, Shape, TpuSizes, choose_sizes


class Speed(NamedTuple):
    """Public figures of a device."""

    ghz: float
    hbm_gb_per_s: float


SPEEDS = {"v5e": Speed(1.5, 819), "v5p": Speed(1.75, 2765), "v6e": Speed(1.75, 1640), "tpu7x": Speed(2.2, 3690)}
BUDGETS = {"8.0": 1.0, "4.8": 0.6}  # real experts per token: share of the rows
ITEMSIZE = 2
KERNELS = ("expert_mlp_forward", "expert_mlp_backward", "expert_mlp_backward_weights")


def sizes_for(chip: str, shape: kernels.ExpertShape) -> TpuSizes:
    capacity = -(-shape.capacity // 16) * 16
    return choose_sizes(CHIPS[chip], Shape(capacity, shape.width, shape.hidden, ITEMSIZE))


def draw_counts(shape: kernels.ExpertShape, share: float) -> np.ndarray:
    """Rows of each expert: one multinomial draw, its chances lognormal with sigma 0.3; no more than a buffer holds."""
    rng = np.random.default_rng(0)
    chances = rng.lognormal(sigma=0.3, size=shape.experts)
    counts = rng.multinomial(round(shape.rows * share), chances / chances.sum())
    return np.minimum(counts, shape.capacity)


def traffic(name: str, shape: kernels.ExpertShape, sizes: TpuSizes) -> tuple[KernelSizes, int, int, int, int]:
    """(sizes, bytes read a row, bytes read an expert, bytes written a row, bytes written an expert) of a kernel."""
    D, F = shape.width, shape.hidden
    weights = 3 * D * F * ITEMSIZE
    if name == "expert_mlp_forward":
        return sizes.forward, D * ITEMSIZE, weights, (D + 2 * F) * ITEMSIZE, 0
    if name == "expert_mlp_backward":
        return sizes.backward, (D + 2 * F) * ITEMSIZE, weights, (D + 3 * F) * ITEMSIZE, 0
    turns = -(-F // (sizes.weights.columns or F))  # x and the gradient of y are read once for each part of the columns
    return sizes.weights, (2 * D * turns + 3 * F) * ITEMSIZE, 0, 0, weights


def model_us(name: str, chip: str, shape: kernels.ExpertShape, summary: dict[str, Any], counts: np.ndarray) -> float:
    """Microseconds of one call."""
    all_sizes = sizes_for(chip, shape)
    own, row_in, expert_in, row_out, expert_out = traffic(name, shape, all_sizes)
    steps = tiles.list_tiles(counts, shape.capacity, own.block)
    gradients = name.endswith("weights")
    stop = int(steps.num_touched) if gradients else steps.rows.size - 1
    rows = np.asarray(steps.rows)[:stop]
    source, block = np.asarray(steps.source_expert)[:stop], np.asarray(steps.block)[:stop]
    height = np.clip(shape.capacity - block * own.block, 0, own.block)  # of the block, which copies move whole
    turns = -(-shape.hidden // own.columns) if own.columns else 1
    cycles = np.array([_pass_cycles(summary, own, int(n)) for n in rows]) + summary["step_cycles"]
    closing = np.asarray(steps.closes)[:stop] == 1
    cycles += summary["skipped_cycles"] * (closing if gradients else np.ones_like(closing))
    cores, speed = CHIPS[chip].cores, SPEEDS[chip]
    first = np.append(True, source[1:] != source[:-1])
    read = np.where(rows > 0, height * row_in, 0) + first * expert_in
    written = height * row_out + closing * expert_out
    if gradients:  # the cores take parts of the columns, each through all tiles
        compute_us = cycles * turns / cores / speed.ghz * 1e-3
    else:
        compute_us = cycles / cores / speed.ghz * 1e-3
    copy_us = (np.append(read[1:], 0) + np.append(0, written[:-1])) / speed.hbm_gb_per_s * 1e-3
    return float(np.maximum(compute_us, copy_us).sum() + (read[0] + written[-1]) / speed.hbm_gb_per_s * 1e-3)


def _pass_cycles(summary: dict[str, Any], own: KernelSizes, rows: int) -> int:
    """Cycles of the passes over `rows` live rows."""
    passes = [p["cycles"] for p in summary["passes"]]
    looped = own.block > own.slab
    full, rest = divmod(rows, own.slab) if looped else (0, rows)
    part = -(-rest // own.step)
    return full * passes[-1] + (passes[part - 1] if part else 0)


def compile_all(chips: list[str], shapes: list[str], cache: pathlib.Path | None) -> dict[str, Any]:
    """{chip: {shape: {kernel: summary}}}."""
    directory = pathlib.Path(tempfile.mkdtemp())
    topology.open_compiler(directory)
    results: dict[str, Any] = json.loads(cache.read_text()) if cache and cache.exists() else {}
    for chip in chips:
        for shape in shapes:
            if shape in results.setdefault(chip, {}):
                continue
            arguments = kernels.arguments(kernels.SHAPES[shape])
            found = report.compile_report(chip, kernels.forward_backward, arguments, directory)
            results[chip][shape] = {r.name: r.summary() for r in found}
            print(chip, shape, *(f"{r.name} {r.occupancy:.2f}" for r in found), file=sys.stderr, flush=True)
            if cache:
                cache.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--golden", type=pathlib.Path, help="kept reports: what it holds is not compiled again")
    parser.add_argument("--chips", nargs="+", default=list(topology.TOPOLOGIES))
    parser.add_argument("--shapes", nargs="+", default=list(kernels.SHAPES))
    args = parser.parse_args()
    summaries = compile_all(args.chips, args.shapes, args.golden)
    print(json.dumps({c: list(s) for c, s in summaries.items()}))


if __name__ == "__main__":
    main()

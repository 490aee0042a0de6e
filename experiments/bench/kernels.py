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

import jax.numpy as jnp
import numpy as np

from anyexperts_jax.aot import kernels, report, topology
from anyexperts_jax.ops.expert_mlp import tiles
from anyexperts_jax.ops.expert_mlp.tpu_sizes import CHIPS, KernelSizes, Shape, TpuSizes, choose_sizes


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
BUDGETS = {"8.0": 1.0, "4.8": 0.6}  # real experts per token: share of the rows
ITEMSIZE = 2
INFERENCE = "expert_mlp_forward, nothing kept"
PARTS = {
    "inference": (INFERENCE,),
    "forward": ("expert_mlp_forward",),
    "backward": ("expert_mlp_backward", "expert_mlp_backward_weights"),
}


def sizes_for(chip: str, shape: kernels.ExpertShape) -> TpuSizes:
    capacity = -(-shape.capacity // 16) * 16
    return choose_sizes(CHIPS[chip], Shape(capacity, shape.width, shape.hidden, ITEMSIZE))


def draw_counts(shape: kernels.ExpertShape) -> np.ndarray:
    """Rows of each expert: one multinomial draw, its chances lognormal with sigma 0.3; no more than a buffer holds."""
    rng = np.random.default_rng(0)
    chances = rng.lognormal(sigma=0.3, size=shape.experts)
    return np.minimum(rng.multinomial(shape.rows, chances / chances.sum()), shape.capacity)


def traffic(name: str, shape: kernels.ExpertShape, sizes: TpuSizes) -> tuple[KernelSizes, int, int, int, int]:
    """(sizes, bytes read a row, bytes read an expert, bytes written a row, bytes written an expert) of a kernel."""
    D, F = shape.width, shape.hidden
    weights = 3 * D * F * ITEMSIZE
    if name == INFERENCE:
        return sizes.forward, D * ITEMSIZE, weights, D * ITEMSIZE, 0
    if name == "expert_mlp_forward":
        return sizes.forward, D * ITEMSIZE, weights, (D + 2 * F) * ITEMSIZE, 0
    if name == "expert_mlp_backward":
        return sizes.backward, (D + 2 * F) * ITEMSIZE, weights, (D + 3 * F) * ITEMSIZE, 0
    turns = -(-F // (sizes.weights.columns or F))  # x and the gradient of y are read once for each part of the columns
    return sizes.weights, (2 * D * turns + 3 * F) * ITEMSIZE, 0, 0, weights


def model_us(name: str, chip: str, shape: kernels.ExpertShape, summary: dict[str, Any], counts: np.ndarray) -> float:
    """Microseconds of one call."""
    own, row_in, expert_in, row_out, expert_out = traffic(name, shape, sizes_for(chip, shape))
    listed = tiles.list_tiles(jnp.asarray(counts), shape.capacity, own.block)
    gradients = name == "expert_mlp_backward_weights"
    stop = int(listed.num_touched) if gradients else listed.rows.size - 1
    rows, block, source, closes = (
        np.asarray(a)[:stop] for a in (listed.rows, listed.block, listed.source_expert, listed.closes)
    )
    skipped = closes == 1 if gradients else np.ones(stop, bool)  # the weights' totals are rounded once an expert
    cycles = np.array([_pass_cycles(summary, own, int(n)) for n in rows]) + summary["step_cycles"]
    cycles = cycles + summary["skipped_cycles"] * skipped
    turns = -(-shape.hidden // own.columns) if gradients and own.columns else 1
    compute_us = cycles * turns / CHIPS[chip].cores / SPEEDS[chip].ghz * 1e-3
    height = np.clip(shape.capacity - block * own.block, 0, own.block)  # copies move a tile's block whole
    new_expert = np.append(True, source[1:] != source[:-1])
    read = np.where(rows > 0, height * row_in, 0) + new_expert * expert_in
    written = height * row_out + (closes == 1) * expert_out
    beside = np.append(read[1:], 0) + np.append(0, written[:-1])
    exposed = read[0] + written[-1]
    per_byte_us = 1e-3 / SPEEDS[chip].hbm_gb_per_s
    return float(np.maximum(compute_us, beside * per_byte_us).sum() + exposed * per_byte_us)


def floor_us(chip: str, shape: kernels.ExpertShape, counts: np.ndarray, part: str) -> float:
    """The longer of the matmuls at the peak rate and of every operand and result moved once, for live rows alone."""
    D, F, rows = shape.width, shape.hidden, int(counts.sum())
    matmuls, matrices = (6, 6) if part == "backward" else (3, 3)
    values = {"inference": 2 * D, "forward": 2 * D + 2 * F, "backward": 3 * D + 2 * F}[part]
    moved = ITEMSIZE * (matrices * D * F * int((counts > 0).sum()) + rows * values)
    return max(2 * matmuls * D * F * rows / SPEEDS[chip].tflop_per_s * 1e-6, moved / SPEEDS[chip].hbm_gb_per_s * 1e-3)


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


def table(summaries: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a chip, shape and part: ns of the model a kept row at each budget, the floor, and the ratio of the times.

    Buffers are sized by the budget, as `dispatch` sizes them.
    """
    rows = []
    for chip, shapes in summaries.items():
        for name, found in shapes.items():
            for part, names in PARTS.items():
                row: dict[str, Any] = {"chip": chip, "shape": name, "part": part}
                times = []
                for budget, share in BUDGETS.items():
                    shape = kernels.SHAPES[name]
                    shape = shape._replace(rows=round(shape.rows * share))
                    counts = draw_counts(shape)
                    times.append(sum(model_us(k, chip, shape, found[k.split(",")[0]], counts) for k in names))
                    row[f"kept_rows_{budget}"] = int(counts.sum())
                    row[f"ns_{budget}"] = round(1e3 * times[-1] / int(counts.sum()), 2)
                    row[f"floor_ns_{budget}"] = round(1e3 * floor_us(chip, shape, counts, part) / int(counts.sum()), 2)
                rows.append(row | {"ratio": round(times[1] / times[0], 3)})
    return rows


_HEAD = """Nothing here was run on a device. ns of model time a kept row: the compiler's cycles and the copies beside
them, step by step (see the script). `inference` keeps nothing for a backward pass (its cycles are those of `forward`, a
bound), `forward` keeps gate and up. In brackets the floor: the longer of the matmuls at the peak rate and of all
operands and results moved once. The ratio is the time at an average of 4.8 real experts a token over that at 8.0,
buffers sized by the budget; where reading the weights sets the pace, the floor's own ratio is above 0.60."""


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    lines = ["# Expert kernels on TPUs, static", "", f"`{command}`", "", _HEAD, ""]
    lines += ["| chip | shape | part | 8.0 | 4.8 | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        times = [f"{row[f'ns_{b}']:.1f} ({row[f'floor_ns_{b}']:.1f})" for b in BUDGETS]
        lines.append(f"| {row['chip']} | {row['shape']} | {row['part']} | {' | '.join(times)} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--golden", type=pathlib.Path, help="kept reports: what it holds is not compiled again")
    parser.add_argument("--chips", nargs="+", default=list(topology.TOPOLOGIES))
    parser.add_argument("--shapes", nargs="+", default=list(kernels.SHAPES))
    args = parser.parse_args()
    rows = table(compile_all(args.chips, args.shapes, args.golden))
    command = f"python experiments/bench/kernels.py {' '.join(sys.argv[1:])}"
    (args.out / "kernels_tpu.json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    (args.out / "kernels_tpu.md").write_text(markdown(rows, command))


if __name__ == "__main__":
    main()

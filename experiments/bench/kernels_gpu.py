"""Writes experiments/results/kernels_gpu.{json,md}: the resources of GPU kernels, read from the compiler.

    python experiments/bench/kernels_gpu.py [FOLDER]

Needs no GPU, but the extra `aot-gpu` and JAX 0.11. Takes about two minutes. The figures are static; nothing is run.
tests/aot compares its own compilation with the file, so the file is also the reference for regressions.
"""

import json
import pathlib
import sys

import jax

from anyexperts_jax.aot.gpu_kernels import SHAPES, reports
from anyexperts_jax.core.hardware import gpus

COMMAND = "python experiments/bench/kernels_gpu.py"
COLUMNS = ("kernel", "registers", "spilled bytes", "shared KiB", "threads", "tensor cores", "TMA")


def main(folder: pathlib.Path) -> None:
    kernels = {name: report._asdict() for name, report in reports()}
    result = {
        "command": COMMAND,
        "targets": {gpu.limits.name: gpu.device for gpu in gpus().values()},
        "jax": jax.__version__,
        "note": "static: read from compiler output, nothing was run",
        "shapes": {name: shape._asdict() for name, shape in SHAPES.items()},
        "kernels": kernels,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "kernels_gpu.md").write_text(as_markdown(result))


def as_markdown(result: dict) -> str:
    shapes = "; ".join(
        f"{name}: E {s['experts']}, {_rows(s)}, D {s['width']}, F {s['hidden']}" for name, s in result["shapes"].items()
    )
    limits = ", ".join(f"{gpu.shared_kib} KiB on an {gpu.limits.name}" for gpu in gpus().values())
    lines = [
        "# GPU kernels (static)",
        "",
        f"`{result['command']}`, JAX {result['jax']}. Read from ptxas and XLA; nothing was run, no figure is a time.",
        "Registers are per thread (the limit is 255; the 168 of the Mosaic kernels is their share of 65536 among 384",
        "threads, handed from the copying warpgroup to the multiplying ones at run time), shared memory per block",
        f'(the limit is {limits}). "kept" is the forward kernel when a gradient follows.',
        "The Mosaic kernels (`pallas_gpu`) take bfloat16 alone: wgmma wants float32 operands contiguous along the",
        "contraction, which the weights are in one direction only; float32 goes through `pallas_triton`.",
        f"{shapes}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for name, k in result["kernels"].items():
        shared, tma = f"{k['shared_bytes'] / 1024:.1f}", "yes" if k["tma"] else "no"
        cells = (name, k["registers"], k["spill_bytes"], shared, k["threads"], k["tensor_cores"], tma)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _rows(shape: dict) -> str:
    return f"C {shape['capacity']}" if shape["blocks"] is None else f"{shape['blocks']} blocks of {shape['capacity']}"


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "experiments/results"))

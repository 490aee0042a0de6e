"""Chooses the GPU kernels' tiles and writes the package's table of them.

    python -m experiments.bench.tune_gpu [--table FILE]

For each GPU, implementation and dtype the candidates of a kernel are the tiles that were fastest on that GPU, if one
was available, then the heuristic's, then ever smaller ones. The first candidate is chosen that, compiled for the GPU,
spills nothing, multiplies on tensor cores and fits in shared memory and registers, at the studied shapes and at the
edges of the class. Static tools tell which tiles fit, not which are fastest, so they do not change this order.

Needs no GPU, but the extra `aot-gpu` and JAX 0.11. Takes about four minutes. Run experiments/bench/kernels_gpu.py
afterwards.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from anyexperts_jax.aot.gpu import KernelReport, compile_kernel, complaints
from anyexperts_jax.aot.gpu_kernels import BLOCK, SHAPES, Shape, cases_of
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.hardware import Gpu, gpus
from anyexperts_jax.ops.expert_mlp import gpu_tile_table
from anyexperts_jax.ops.expert_mlp.gpu_tiles import GpuShape, Tile, Tiles, TritonTile, choose_tiles, shared_bytes

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / "anyexperts_jax" / "ops" / "expert_mlp" / gpu_tile_table.FILE
COMMAND = "python -m experiments.bench.tune_gpu"
SETS = (
    ("H100", "pallas_gpu", "bfloat16"),
    ("H100", "pallas_triton", "bfloat16"),
    ("H100", "pallas_triton", "float32"),
    ("A100", "pallas_triton", "bfloat16"),
    ("A100", "pallas_triton", "float32"),
)
NARROWEST = 512  # of the class; narrower experts use the heuristic
ROW_BYTES = 16  # rows of the class's arrays are multiples of: with others, Triton's copies are not asynchronous
WIDE = {"pallas_triton": 2888, "pallas_gpu": 2880}  # end inside a tile; Mosaic's widths are padded to 64
# Fastest of what ran on the GPU: a row of the file, but d_w_gate_up with the stages that fit over [E, C, D] too.
MEASURED = {
    ("H100", "pallas_triton", "bfloat16"): (
        "experiments/results/h100/tiles.md",
        Tiles(
            gate_up=TritonTile(m=128, n=128, k=64, warps=8, stages=4),
            down=TritonTile(m=128, n=256, k=64, warps=8, stages=3),
            d_gate_up=TritonTile(m=128, n=64, k=64, warps=8, stages=4),
            d_x=TritonTile(m=128, n=128, k=64, warps=8, stages=3),
            d_w_gate_up=TritonTile(m=128, n=128, k=64, warps=8, stages=4),
            d_w_down=TritonTile(m=128, n=128, k=64, warps=8, stages=5),
        ),
    ),
}


def shapes(implementation: str) -> dict[str, Shape]:
    """Returns the studied shapes and the class's edges: its narrowest width, and widths that end inside a tile."""
    wide = WIDE[implementation]
    return SHAPES | {
        f"{NARROWEST}": Shape(8, 104, NARROWEST, NARROWEST),
        f"{wide}": Shape(8, 200, wide, wide),
        f"{wide} dropless": Shape(8, BLOCK, wide, wide, 40),
    }


def candidates(kernel: str, gpu: str, implementation: str, dtype: str) -> Iterator[Tile]:
    """Yields the tiles to try, the fastest first."""
    target, itemsize = gpus()[gpu.lower()], jnp.dtype(dtype).itemsize
    _, measured = MEASURED.get((gpu, implementation, dtype), ("", None))
    if measured is not None:
        yield getattr(measured, kernel)
    tile = getattr(choose_tiles(implementation, target.limits, GpuShape(2048, 2048, itemsize)), kernel)
    if shared_bytes(kernel, tile, itemsize) <= target.limits.shared_bytes:
        yield tile
    while tile.n > 64 or tile.stages > 2:
        tile = dataclasses.replace(tile, n=max(64, tile.n // 2), stages=max(2, tile.stages - 1))
        yield tile


def label(tile: Tile) -> str:
    return ", ".join(f"{field} {size}" for field, size in dataclasses.asdict(tile).items())


def try_tile(
    kernel: str, tile: Tile, target: Gpu, implementation: str, dtype: str
) -> tuple[dict[str, KernelReport], dict[str, str]]:
    """Returns ({shape: report}, {shape: what is wrong})."""
    reports, wrong = {}, {}
    for name, shape in shapes(implementation).items():
        cases = cases_of(implementation, Tiles(*(tile,) * len(Tiles._fields)), shape, dtype)
        for case in (each for each in cases if each.partition(",")[0] == kernel):
            place = f"{name}{case.removeprefix(kernel)}"
            try:
                reports[place] = compile_kernel(*cases[case], target)
            except jax.errors.JaxRuntimeError as error:
                wrong[place] = f"refused: {' '.join(str(error).split())[:100]}"
                return reports, wrong
            found = complaints(reports[place], target)
            if found:
                wrong[place] = "; ".join(found)
                return reports, wrong
    return reports, wrong


def choose(kernel: str, gpu: str, implementation: str, dtype: str) -> tuple[Tile, dict[str, str]]:
    """Returns (the first candidate without a fault, {label: what the compiler said})."""
    said: dict[str, str] = {}
    for tile in candidates(kernel, gpu, implementation, dtype):
        reports, wrong = try_tile(kernel, tile, gpus()[gpu.lower()], implementation, dtype)
        if not wrong:
            registers = max(report.registers for report in reports.values())
            shared = max(report.shared_bytes for report in reports.values())
            said[label(tile)] = f"taken: up to {registers} registers, {shared} bytes of shared memory, no spills"
            return tile, said
        said[label(tile)] = "; ".join(f"{place} {what}" for place, what in wrong.items())
    require(False, f"{gpu}/{implementation}/{dtype}/{kernel}: no candidate compiles well: {said}")
    raise AssertionError


def entry(gpu: str, implementation: str, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (the table's entry, {kernel: the tiles tried})."""
    tiles, tried = {}, {}
    for kernel in Tiles._fields:
        tile, tried[kernel] = choose(kernel, gpu, implementation, dtype)
        tiles[kernel] = dataclasses.asdict(tile)
    source, measured = MEASURED.get((gpu, implementation, dtype), ("", None))
    kept = measured is not None and tiles == {k: dataclasses.asdict(t) for k, t in measured._asdict().items()}
    fields: dict[str, Any] = {
        "implementation": implementation,
        "itemsize": jnp.dtype(dtype).itemsize,
        "narrowest": NARROWEST,
        "multiple": 1 if implementation == "pallas_gpu" else ROW_BYTES // jnp.dtype(dtype).itemsize,
        "source": f"device: {source}" if kept else "static",
        "tiles": tiles,
    }
    return fields, tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=pathlib.Path, default=TABLE)
    args = parser.parse_args()
    gpus: dict[str, Any] = {}
    tried = {}
    for gpu, implementation, dtype in SETS:
        fields, tried[f"{gpu}/{implementation}/{dtype}"] = entry(gpu, implementation, dtype)
        gpus.setdefault(gpu, []).append(fields)
        print(json.dumps(tried[f"{gpu}/{implementation}/{dtype}"], indent=1), flush=True)
    compiled = {
        target.limits.name: {"device": target.device, "compute capability": target.capability}
        for target in gpus().values()
    }
    packages = ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
    provenance = {
        "note": "what fits is static, read from ptxas and XLA; what is fastest, a device run where source names one",
        "tool": "experiments/bench/tune_gpu.py",
        "command": COMMAND,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
        "compiled for": compiled,
        "at": {name: [shape._asdict() for shape in shapes(name).values()] for name in WIDE},
        "tried": tried,
    }
    args.table.write_text(json.dumps({"provenance": provenance, "gpus": gpus}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Compares the TPU kernels' block sizes by static time and writes the best ones to the package's table.

    python -m experiments.bench.tune [--chip v5e ...] [--shape A ...] [--kernel forward ...] [--seconds 600]

Compiles the candidates that experiments/results/kernels_tpu.json lacks (see experiments/bench/kernels.py), then writes
anyexperts_jax/ops/expert_mlp/tpu_sizes.json anew from all that is in it: for each chip, shape and kernel the candidate
with the least time at 8.0 real experts a token, the heuristic's where they tie within half a percent or where nothing
was compared.
Nothing here is run on a device.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from anyexperts_jax.aot import kernels
from anyexperts_jax.core.hardware import tpus
from anyexperts_jax.ops.expert_mlp import tpu_size_table
from anyexperts_jax.ops.expert_mlp.tpu_sizes import (
    KERNELS,
    KernelSizes,
    Shape,
    TpuSizes,
    block_budget,
    choose_sizes,
    kernel_bytes,
)
from experiments.bench import tpu_model, tpu_table
from experiments.bench.kernels import NOTE, RESULT, ROOT, Task, compile_all, load, our_task, versions

TABLE = ROOT / "anyexperts_jax" / "ops" / "expert_mlp" / tpu_size_table.FILE
_TIE = 0.995
_PACKED_ROWS = 16  # bfloat16 rows in one register
_MATRIX_UNIT = 256
_MOST_ROWS = 512  # rows in a pass


def candidates(chip: str, name: str, kernel: str) -> list[TpuSizes]:
    """Returns the sizes to compare, the heuristic's first.

    Then all rows of an expert in one block; larger slabs for kernels that sum over rows, and for the others all rows
    of an expert in one of four passes; and for the forward kernel a last sum over hidden columns that do not fill a
    tile of a 256-wide matrix unit.

    Steps have at least 64 rows: a program of more than four passes may not fit in instruction memory, which the figures
    do not show."""
    shape = class_of(name)
    base = choose_sizes(tpus()[chip].limits, shape)
    own: KernelSizes = getattr(base, kernel)
    whole = -(-shape.capacity // own.step) * own.step
    found = [own]
    if whole > own.block:
        slabs = (own.slab, 2 * own.slab) if kernel == "weights" else (own.slab,)
        found += [dataclasses.replace(own, block=b, slab=s) for b in (own.block, whole) for s in slabs if s <= b]
    quarter = -(-shape.capacity // 4 // _PACKED_ROWS) * _PACKED_ROWS
    if kernel != "weights" and 4 * quarter <= _MOST_ROWS:
        found.append(dataclasses.replace(own, block=4 * quarter, slab=4 * quarter, step=quarter))
    if kernel == "forward" and shape.hidden % _MATRIX_UNIT and shape.hidden > _MATRIX_UNIT:
        inner = shape.hidden // _MATRIX_UNIT * _MATRIX_UNIT
        found += [dataclasses.replace(one, inner=inner) for one in found]
    fitting = []
    for sizes in found:
        if sizes not in fitting and kernel_bytes(kernel, shape, sizes) <= block_budget(tpus()[chip].limits):
            fitting.append(sizes)
    return [dataclasses.replace(base, **{kernel: sizes}) for sizes in fitting]


def class_of(name: str) -> Shape:
    shape = kernels.SHAPES[name]
    return Shape(tpu_table.rows_of(shape), shape.width, shape.hidden, tpu_model.ITEMSIZE)


def tasks(chips: list[str], shapes: list[str], which: list[str]) -> Iterator[Task]:
    for kernel in which:
        for chip in chips:
            for name in shapes:
                found = candidates(chip, name, kernel)
                for sizes in found if len(found) > 1 else ():
                    task = our_task(chip, name, kernel, sizes)
                    yield task._replace(name=place(chip, name, kernel, getattr(sizes, kernel)))


def place(chip: str, name: str, kernel: str, sizes: KernelSizes) -> str:
    return f"{chip}/{name}/tuned/{kernel}/{label(sizes)}"


def label(sizes: KernelSizes) -> str:
    inner = f", inner {sizes.inner}" if sizes.inner else ""
    return f"block {sizes.block}, slab {sizes.slab}, step {sizes.step}{inner}"


def static_ns(chip: str, name: str, kernel: str, sizes: TpuSizes, summary: dict[str, Any]) -> float:
    """Returns the static ns per kept row at budget 8.0."""
    shape = kernels.SHAPES[name]
    counts = tpu_model.draw_counts(shape)
    steps = tpu_model.our_steps(kernel, chip, shape, sizes, summary, counts)
    return round(1e3 * tpu_model.longest_us(steps, chip) / int(np.sum(counts)), 2)


def choose(programs: dict[str, Any], chip: str, name: str, kernel: str) -> tuple[KernelSizes, dict[str, Any]]:
    """Returns (the best compiled sizes, {label: ns, or why there is none})."""
    found = candidates(chip, name, kernel)
    best, least, said = getattr(found[0], kernel), None, {}
    for sizes in found:
        own = getattr(sizes, kernel)
        one = programs.get(place(chip, name, kernel, own), {}).get("found", {})
        if "passes" not in one:
            said |= {label(own): one["unread"]} if one else {}
            continue
        said[label(own)] = ns = static_ns(chip, name, kernel, sizes, one)
        if least is None or ns < _TIE * least:
            best, least = own, ns
    return best, said


def table(programs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns ({chip: entries}, {chip/shape/kernel: the compared sizes})."""
    chips: dict[str, Any] = {}
    compared = {}
    for chip in tpus():
        chips[chip] = []
        for name in kernels.SHAPES:
            shape = class_of(name)
            entry: dict[str, Any] = {"over": shape.capacity // 2} | shape._asdict()
            for kernel in KERNELS:
                sizes, compared[f"{chip}/{name}/{kernel}"] = choose(programs, chip, name, kernel)
                entry[kernel] = dataclasses.asdict(sizes)
            chips[chip].append(entry)
    return chips, {where: said for where, said in compared.items() if said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", default=list(tpus()), choices=tpus())
    parser.add_argument("--shape", nargs="+", default=list(kernels.SHAPES), choices=kernels.SHAPES)
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="compile nothing more after so long")
    parser.add_argument("--result", type=pathlib.Path, default=RESULT)
    parser.add_argument("--table", type=pathlib.Path, default=TABLE)
    args = parser.parse_args()
    compile_all(tasks(args.chip, args.shape, args.kernel), args.result, args.seconds)
    chips, compared = table(load(args.result)["programs"])
    provenance = {
        "note": NOTE,
        "tool": "experiments/bench/tune.py: the compiler's cycles and the copies beside them",
        "command": "python -m experiments.bench.tune",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "ns a row": compared,
    }
    args.table.write_text(json.dumps({"provenance": provenance, "chips": chips}, indent=1) + "\n")
    print(json.dumps(compared, indent=1))


if __name__ == "__main__":
    main()

"""Times the dropless Triton path at the paper's layer with several tiles, on the attached GPU.

    python -m experiments.bench.gpu_tiles [--rounds 5]

Forward, and forward with backward, at averages of 8.0 and 4.8 real experts of at most 12 slots. "written out" gathers
tokens into the buffer first; all others read tokens where they are. All programs run in turn; medians are printed.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from anyexperts_jax.bench.cases import budget_plan, compiled, operands, with_backward
from anyexperts_jax.bench.layer import compile_together
from anyexperts_jax.bench.stopwatch import interleaved_rounds
from anyexperts_jax.core.hardware import gpus
from anyexperts_jax.core.shapes import SHAPES
from anyexperts_jax.core.text_table import TextTable, print_tables
from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.expert_mlp import pallas_triton
from anyexperts_jax.ops.expert_mlp.gpu_passes import GpuOptions
from anyexperts_jax.ops.expert_mlp.gpu_tile_table import tiles_for
from anyexperts_jax.ops.expert_mlp.gpu_tiles import GpuShape, Tiles, TritonTile
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import buffered, gpu

SHAPE = SHAPES["P"]
REAL = (8.0, 4.8)
SLOTS = 12
REPEATS = 6  # calls per sample
WRITTEN_OUT = "written out"

_OURS = tiles_for("pallas_triton", gpus()["h100"].device, GpuShape(SHAPE.width, SHAPE.hidden, 2))
_FIRST = _OURS._replace(  # the tiles chosen before anything ran on a GPU
    gate_up=TritonTile(128, 128, 64, 8, 3),
    down=TritonTile(128, 128, 64, 8, 4),
    d_w_gate_up=TritonTile(128, 128, 64, 8, 3),
    d_w_down=TritonTile(128, 128, 64, 8, 4),
)
CANDIDATES: dict[str, Tiles] = {
    WRITTEN_OUT: _FIRST,
    "first tiles": _FIRST,
    "more stages for the weights": _FIRST._replace(
        d_w_gate_up=TritonTile(128, 128, 64, 8, 5), d_w_down=TritonTile(128, 128, 64, 8, 5)
    ),
    "d_x 256 wide": _OURS._replace(d_x=TritonTile(128, 256, 64, 8, 2)),
    "gate_up k 32": _OURS._replace(gate_up=TritonTile(128, 128, 32, 8, 5)),
    "down 4 warps": _OURS._replace(down=TritonTile(128, 128, 64, 4, 4)),
    "the library's": _OURS,
}


def programs(name: str, tiles: Tiles) -> dict[str, Callable[..., Any]]:
    """Returns the timed functions of (x_ND, weights_NK, order, experts) by name."""
    kernels = gpu.aligned_kernels(pallas_triton, GpuOptions(tiles=tiles))
    if name == WRITTEN_OUT:
        kernels = kernels._replace(take=buffered.take_tokens)
    how = {"kernels": kernels, "block": gpu.buffer_block(tiles)}

    def forward(x_ND, weights_NK, order, experts):  # type: ignore[no-untyped-def]
        return buffered.routed_mlp(x_ND, weights_NK, order, ExpertWeights(*experts), **how)

    def backward(x_ND, weights_NK, order, experts):  # type: ignore[no-untyped-def]
        return with_backward(lambda x, w, e: forward(x, w, order, e))(x_ND, weights_NK, experts)

    return {"forward": forward, "forward+backward": backward}


def main(rounds: int) -> None:
    x_ND, experts = operands(SHAPE, "bfloat16")
    cases = {}
    for real in REAL:
        plan = budget_plan(SHAPE, SLOTS, real)
        order = jax.jit(sort_slots, static_argnums=1)(plan.expert_ids_NK, SHAPE.experts)
        for name, tiles in CANDIDATES.items():
            for run, function in programs(name, tiles).items():
                case = functools.partial(compiled, function, x_ND, plan.weights_NK, order, experts)
                cases[name, run, real] = case
    named = {"|".join(map(str, key)): case for key, case in cases.items()}
    found = interleaved_rounds({key: one.call for key, one in compile_together(named).items()}, rounds, 0.0, REPEATS)
    runs = [(run, real) for run in ("forward", "forward+backward") for real in REAL]
    rows = [(name, *(f"{found.milliseconds(f'{name}|{run}|{real}'):.2f}" for run, real in runs)) for name in CANDIDATES]
    columns = ("tiles", *(f"{run} {real:g}" for run, real in runs))
    print_tables([TextTable(f"ms, {jax.devices()[0].device_kind}", columns, tuple(rows))], Console(highlight=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)

"""Other libraries' kernels for the same work and the costs of their steps: tokamax gmm_v2, tgmm_v2 and megablox.

They take rows packed by expert, [R, D], not buffers. Every choice is made in their favour: operations between the
kernels (SwiGLU and its gradient, transposes) are not counted, and of several variants of one pass the shortest counts.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.aot.kernels import ExpertShape
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.hardware import tpus
from experiments.bench.tpu_model import ITEMSIZE, Steps

_SUBLANES = 16  # bfloat16 rows are moved in groups of this size
_MEGABLOX_ROWS, _MEGABLOX_COLUMNS = 256, 512  # its default, 128 each way, moves seven times the bytes


class Matmul(NamedTuple):
    """One grouped matmul: `kind` is "gmm", its transpose "gmm_t" (rows times weights^T) or "tgmm" (rows^T rows)."""

    kind: str
    k: int  # the contracted size, or for "tgmm" the rows of the result
    n: int
    act: bool = False  # SwiGLU of the halves of n follows in the kernel


def matmuls(library: str, part: str, shape: ExpertShape) -> dict[str, Matmul]:
    """Returns the kernels of one pass; gate and up are one matrix of 2 F columns."""
    D, F = shape.width, shape.hidden
    if part == "forward":
        return {"up": Matmul("gmm", D, 2 * F, act=library == "tokamax"), "down": Matmul("gmm", F, D)}
    return {
        "d_hidden": Matmul("gmm_t", D, F),
        "d_x": Matmul("gmm_t", 2 * F, D),
        "d_w_up": Matmul("tgmm", D, 2 * F),
        "d_w_down": Matmul("tgmm", F, D),
    }


def program(library: str, shape: ExpertShape, m: Matmul) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """Returns (function, abstract arguments) of the kernel."""
    E, R = shape.experts, shape.rows
    left, counts = jax.ShapeDtypeStruct((R, m.k), jnp.bfloat16), jax.ShapeDtypeStruct((E,), jnp.int32)
    sizes = {"gmm": (E, m.k, m.n), "gmm_t": (E, m.n, m.k), "tgmm": (R, m.n)}
    right = jax.ShapeDtypeStruct(sizes[m.kind], jnp.bfloat16)
    return (_tokamax if library == "tokamax" else _megablox)(m, E), [left, right, counts]


def _tokamax(m: Matmul, experts: int) -> Callable[..., Any]:
    from tokamax._src.ops.gmm_v2.gmm_v2 import gmm_v2
    from tokamax._src.ops.gmm_v2.tgmm_v2 import tgmm_v2

    if m.kind == "tgmm":
        return lambda left, right, counts: tgmm_v2(left, right, counts, experts, preferred_element_type=jnp.bfloat16)
    more: dict[str, Any] = {"zero_initialize": False, "transpose_rhs": m.kind == "gmm_t"}
    return lambda left, right, counts: gmm_v2(left, right, counts, fuse_act="silu" if m.act else None, **more)


def _megablox(m: Matmul, experts: int) -> Callable[..., Any]:
    del experts
    module = importlib.import_module(
        "jax.experimental.pallas.ops.tpu.megablox.gmm"
    )  # in its package a function of the same name hides the module
    tiling = _megablox_tiling(m)
    if m.kind == "tgmm":
        return lambda left, right, counts: module.tgmm(left.T, right, counts, jnp.bfloat16, tiling)
    transposed = m.kind == "gmm_t"
    return lambda left, right, counts: module.gmm(left, right, counts, jnp.bfloat16, tiling, transpose_rhs=transposed)


def _megablox_tiling(m: Matmul) -> tuple[int, int, int]:
    """Returns (rows, k, n) with the whole contracted side, so weights are read once per block of columns."""
    k = min(m.k, 2 * _MEGABLOX_COLUMNS) if m.kind == "tgmm" else m.k
    return _MEGABLOX_ROWS, k, min(m.n, _MEGABLOX_COLUMNS)


def steps(library: str, chip: str, m: Matmul, summary: dict[str, Any], counts: np.ndarray) -> list[Steps]:
    """Returns the steps of each working core, from the compiled summary."""
    return (_tokamax_steps if library == "tokamax" else _megablox_steps)(chip, m, summary, counts)


def _tokamax_steps(chip: str, m: Matmul, summary: dict[str, Any], counts: np.ndarray) -> list[Steps]:
    tile_m, tile_k, tile_n = (int(re.search(rf"-{t}_(\d+)", summary["name"])[1]) for t in ("tm", "tk", "tn"))  # type: ignore[index]
    wide = m.n // 2 if m.act else m.n
    over_n, over_k = -(-wide // tile_n), -(-m.k // tile_k)
    require(m.kind == "tgmm" or over_k == 1, f"{summary['name']} splits the contracted side: not modelled")
    ends = np.cumsum(counts)
    group, start, stop = [], [], []
    for expert, (begin, end) in enumerate(zip(ends - counts, ends, strict=True)):
        while begin < end:
            after = min(begin + tile_m - begin % _SUBLANES, end)
            group, start, stop = [*group, expert], [*start, begin], [*stop, after]
            begin = after
    first, last, of = np.array(start), np.array(stop), np.array(group)
    reach = last - first // _SUBLANES * _SUBLANES  # rows of the tile, including the previous expert's
    passes = _buckets(summary, m, tile_m)
    base = tile_m // len(passes)
    bucket = np.minimum((reach - 1 if m.kind == "tgmm" else reach) // base, len(passes) - 1)
    cycles = passes[bucket] + summary["step_cycles"] + summary["skipped_cycles"]
    height = -(-reach // _SUBLANES) * _SUBLANES
    opens, closes = np.append(True, of[1:] != of[:-1]), np.append(of[1:] != of[:-1], True)
    if m.kind == "tgmm":
        read = height * (tile_k + tile_n) * ITEMSIZE
        written = closes * tile_k * tile_n * ITEMSIZE
        turns = over_n * over_k
    else:
        read = height * tile_k * ITEMSIZE + opens * tile_k * tile_n * (2 if m.act else 1) * ITEMSIZE
        written = height * tile_n * ITEMSIZE
        turns = over_n
    ahead = 1 if m.kind == "tgmm" else 2  # three buffers of rows and weights
    return _share(chip, turns, cycles, read, written, ahead)


def _buckets(summary: dict[str, Any], m: Matmul, tile_m: int) -> np.ndarray:
    """Returns the pass's cycles by number of rows; `tgmm`'s has four variants (opening or closing an expert)."""
    cycles = [p["cycles"] for p in summary["passes"]]
    variants = 4 if m.kind == "tgmm" else 1
    count = len(cycles) // variants
    require(
        len(cycles) % variants == 0 and tile_m % count == 0 and count <= 4,
        f"{summary['name']}: {len(cycles)} passes do not fit tiles of {tile_m} rows",
    )
    return np.array([min(cycles[i : i + variants]) for i in range(0, len(cycles), variants)])


def _megablox_steps(chip: str, m: Matmul, summary: dict[str, Any], counts: np.ndarray) -> list[Steps]:
    tile_m, tile_k, tile_n = _megablox_tiling(m)
    ends = np.cumsum(counts)
    first, last = (ends - counts) // tile_m, -(-ends // tile_m)
    per_expert = np.where(counts > 0, last - first, 1 if m.kind == "tgmm" else 0)
    of = np.repeat(np.arange(len(counts)), per_expert)
    tile = np.concatenate([np.arange(a, a + n) for a, n in zip(first, per_expert, strict=True)])
    one = summary["passes"][-1]["cycles"] + summary["step_cycles"] + summary["skipped_cycles"]
    new_expert, new_tile = (np.append(True, a[1:] != a[:-1]) for a in (of, tile))
    leaves_tile, leaves_expert = np.append(new_tile[1:], True), np.append(new_expert[1:], True)
    turns = -(-m.n // tile_n)
    if m.kind == "tgmm":
        turns *= -(-m.k // tile_k)
        read = new_tile * tile_m * (tile_k + tile_n) * ITEMSIZE
        written = leaves_expert * tile_k * tile_n * ITEMSIZE
    else:
        read = (new_tile * tile_m * tile_k + new_expert * tile_k * tile_n) * ITEMSIZE
        written = leaves_tile * tile_m * tile_n * ITEMSIZE
    return _share(chip, turns, np.full(len(of), one), read, written, 1)


def _share(chip: str, turns: int, cycles: np.ndarray, read: np.ndarray, written: np.ndarray, ahead: int) -> list[Steps]:
    """Shares the turns, these kernels' parallel axis, among the cores; with one turn only one core works."""
    cores = min(tpus()[chip].cores, turns)
    turns = -(-turns // cores)
    return [Steps(np.tile(cycles, turns), np.tile(read, turns), np.tile(written, turns), ahead, cores)]

"""The kernels and the shapes that are compiled for GPUs, and the table of what they take."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from anyexperts_jax.aot.gpu import A100, H100, KernelReport, Target, compile_kernel, complaints
from anyexperts_jax.core.errors import require
from anyexperts_jax.ops.expert_mlp import pallas_gpu, pallas_triton


class Shape(NamedTuple):
    """Sizes of one call of `expert_mlp`."""

    experts: int
    capacity: int
    width: int
    hidden: int


# 49152, 32768 and 65536 rows, and a quarter more room than that; the last is the paper's layer.
SHAPES = {"A": Shape(64, 960, 2048, 1408), "B": Shape(128, 320, 2048, 768), "P": Shape(256, 320, 2048, 512)}
DTYPES = ("bfloat16", "float32")
TARGETS = {"H100": H100, "A100": A100}

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def triton_cases(shape: Shape, dtype: str, target: Target = H100) -> dict[str, Case]:
    """Every Triton kernel as (function, abstract operands), with the tiles it would run with on `target`."""
    tiles = pallas_triton.default_tiles(jnp.dtype(dtype), target.device_kind)
    return _module_cases(pallas_triton, tiles, shape, dtype)


def mosaic_cases(shape: Shape) -> dict[str, Case]:
    """The same of the Mosaic GPU kernels, in bfloat16."""
    return _module_cases(pallas_gpu, pallas_gpu.TILES, shape, "bfloat16")


def _module_cases(k: Any, tiles: Any, shape: Shape, dtype: str) -> dict[str, Case]:
    x_ECD, hidden_ECF, w_in_EDF, w_down_EFD, counts_E = _operands(shape, dtype)

    def with_tile(kernel: Callable[..., Any], tile: Any, **more: Any) -> Callable[..., Any]:
        return lambda *operands: kernel(*operands, tile=tile, interpret=False, **more)

    forward = (x_ECD, counts_E, w_in_EDF, w_in_EDF)
    return {
        "gate_up": (with_tile(k.gate_up, tiles.gate_up, keep=False), forward),
        "gate_up, kept": (with_tile(k.gate_up, tiles.gate_up, keep=True), forward),
        "down": (with_tile(k.down, tiles.down), (hidden_ECF, counts_E, w_down_EFD)),
        "d_gate_up": (with_tile(k.d_gate_up, tiles.d_gate_up), (x_ECD, counts_E, w_down_EFD, hidden_ECF, hidden_ECF)),
        "d_x": (with_tile(k.d_x, tiles.d_x), (hidden_ECF, hidden_ECF, counts_E, w_in_EDF, w_in_EDF)),
        "d_w_gate_up": (with_tile(k.d_weights, tiles.d_w_gate_up), (x_ECD, counts_E, hidden_ECF, hidden_ECF)),
        "d_w_down": (with_tile(k.d_weights, tiles.d_w_down), (hidden_ECF, counts_E, x_ECD)),
    }


def cases() -> Iterator[tuple[str, Case, Target]]:
    """("target/implementation/shape/dtype/kernel", case, target) of every kernel, the Mosaic ones on Hopper alone."""
    for name, shape in SHAPES.items():
        for kernel, case in mosaic_cases(shape).items():
            yield f"H100/pallas_gpu/{name}/bfloat16/{kernel}", case, H100
    for (target_name, target), (name, shape), dtype in itertools.product(TARGETS.items(), SHAPES.items(), DTYPES):
        for kernel, case in triton_cases(shape, dtype, target).items():
            yield f"{target_name}/pallas_triton/{name}/{dtype}/{kernel}", case, target


def reports() -> Iterator[tuple[str, KernelReport]]:
    """(name, report) of every case, compiled one after the other.

    Raises:
      UserError: a kernel spills, misses the tensor cores or does not fit: no table is made of such.
    """
    for name, case, target in cases():
        report = compile_kernel(*case, target)
        found = complaints(report, target)
        require(not found, f"{name}: {'; '.join(found)}; change its tile")
        yield name, report


def _operands(shape: Shape, dtype: str) -> tuple[Any, ...]:
    e, c, d, f = shape
    sizes = ((e, c, d), (e, c, f), (e, d, f), (e, f, d))
    return *(jax.ShapeDtypeStruct(size, dtype) for size in sizes), jax.ShapeDtypeStruct((e,), jnp.int32)

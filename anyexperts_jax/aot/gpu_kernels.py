"""The kernels and shapes that are compiled for GPUs, and the table of their resources."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from anyexperts_jax.aot.gpu import KernelReport, compile_kernel, complaints
from anyexperts_jax.aot.kernels import SHAPES as EXPERTS
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.hardware import Gpu, gpus
from anyexperts_jax.ops.aligned_rows import num_aligned_rows
from anyexperts_jax.ops.expert_mlp import pallas_gpu, pallas_triton
from anyexperts_jax.ops.expert_mlp.gpu_rows import GpuRows, TokenRows
from anyexperts_jax.ops.expert_mlp.gpu_tile_table import tiles_for
from anyexperts_jax.ops.expert_mlp.gpu_tiles import GpuShape, Tiles


class Shape(NamedTuple):
    """Sizes of one call of the expert MLP."""

    experts: int
    capacity: int  # rows of an expert's buffer, or of a block
    width: int
    hidden: int
    blocks: int | None = None  # blocks of the block-aligned buffer; None: each expert has a buffer


BLOCK = 128  # block of the aligned buffer, which the tiles of all GPUs and dtypes give
SHAPES = {name: Shape(one.experts, one.capacity, one.width, one.hidden) for name, one in EXPERTS.items()}
SHAPES["P dropless"] = SHAPES["P"]._replace(  # the paper's layer, without buffers too
    capacity=BLOCK, blocks=num_aligned_rows(EXPERTS["P"].rows, EXPERTS["P"].experts, BLOCK) // BLOCK
)
DTYPES = ("bfloat16", "float32")
MODULES = {"pallas_triton": pallas_triton, "pallas_gpu": pallas_gpu}

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def triton_cases(shape: Shape, dtype: str, gpu: Gpu) -> dict[str, Case]:
    """Every Triton kernel as (function, abstract operands), with the tiles it would run with on `gpu`."""
    return cases_of("pallas_triton", tiles_of("pallas_triton", shape, dtype, gpu), shape, dtype)


def mosaic_cases(shape: Shape) -> dict[str, Case]:
    """The same for the Mosaic GPU kernels, in bfloat16."""
    return cases_of("pallas_gpu", tiles_of("pallas_gpu", shape, "bfloat16", gpus()["h100"]), shape, "bfloat16")


def tiles_of(implementation: str, shape: Shape, dtype: str, gpu: Gpu) -> Tiles:
    """The tiles that the implementation would run with."""
    itemsize = jnp.dtype(dtype).itemsize
    return tiles_for(implementation, gpu.device, GpuShape(shape.width, shape.hidden, itemsize))


def cases_of(implementation: str, tiles: Tiles, shape: Shape, dtype: str) -> dict[str, Case]:
    """Every kernel of "pallas_triton" or "pallas_gpu" with these tiles, as (function, abstract operands)."""
    k: Any = MODULES[implementation]
    e, c, d, f, blocks = shape
    b, ends = (e, (e, c)) if blocks is None else (blocks, (1, blocks * c))  # ends: the layout for sums over rows
    sizes = ((b, c, d), (b, c, f), (*ends, d), (*ends, f), (e, d, f), (e, f, d))
    operands: tuple[Any, ...] = tuple(jax.ShapeDtypeStruct(s, dtype) for s in sizes)
    x_BCD, hidden_BCF, x_ERD, hidden_ERF, w_in_EDF, w_down_EFD = operands
    tokens: Any = jax.ShapeDtypeStruct((b * c, d), dtype)
    if blocks is not None and k is pallas_triton:  # Triton reads the tokens in place
        x_BCD, x_ERD = (TokenRows(tokens, _integers(*x.shape[:2])) for x in (x_BCD, x_ERD))
    rows = GpuRows(*(_integers(n) for n in (b, b, e, e)))

    def with_tile(kernel: Callable[..., Any], tile: Any, **more: Any) -> Callable[..., Any]:
        return lambda *operands: kernel(*operands, tile=tile, interpret=False, **more)

    forward, last = (x_BCD, rows, w_in_EDF, w_in_EDF), {"zeros": blocks is None}
    return {
        "gate_up": (with_tile(k.gate_up, tiles.gate_up, keep=False), forward),
        "gate_up, kept": (with_tile(k.gate_up, tiles.gate_up, keep=True), forward),
        "down": (with_tile(k.down, tiles.down, **last), (hidden_BCF, rows, w_down_EFD)),
        "d_gate_up": (with_tile(k.d_gate_up, tiles.d_gate_up), (x_BCD, rows, w_down_EFD, hidden_BCF, hidden_BCF)),
        "d_x": (with_tile(k.d_x, tiles.d_x, **last), (hidden_BCF, hidden_BCF, rows, w_in_EDF, w_in_EDF)),
        "d_w_gate_up": (with_tile(k.d_weights, tiles.d_w_gate_up), (x_ERD, rows, hidden_ERF, hidden_ERF)),
        "d_w_down": (with_tile(k.d_weights, tiles.d_w_down), (hidden_ERF, rows, x_ERD)),
    }


def _integers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def cases() -> Iterator[tuple[str, Case, Gpu]]:
    """("GPU/implementation/shape/dtype/kernel", case, GPU) of every kernel; those of Mosaic on Hopper only."""
    for name, shape in SHAPES.items():
        for kernel, case in mosaic_cases(shape).items():
            yield f"H100/pallas_gpu/{name}/bfloat16/{kernel}", case, gpus()["h100"]
    for gpu, (name, shape), dtype in itertools.product(gpus().values(), SHAPES.items(), DTYPES):
        for kernel, case in triton_cases(shape, dtype, gpu).items():
            yield f"{gpu.limits.name}/pallas_triton/{name}/{dtype}/{kernel}", case, gpu


def reports() -> Iterator[tuple[str, KernelReport]]:
    """(name, report) of every case, compiled one after the other.

    Raises:
      UserError: if a kernel spills, misses the tensor cores or does not fit, so that no table contains one that does.
    """
    for name, case, gpu in cases():
        report = compile_kernel(*case, gpu)
        found = complaints(report, gpu)
        require(not found, f"{name}: {'; '.join(found)}; change its tile")
        yield name, report

"""The GPU kernels as differentiable implementations of `expert_mlp`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._checks import KERNELS_SUPPORT_GRAD_ONLY, check_dtype
from anyexperts_jax.ops._gpu import gpu_kind, require_hopper, require_nvidia
from anyexperts_jax.ops._padding import pad_to_multiples
from anyexperts_jax.ops.expert_mlp import pallas_gpu, pallas_triton
from anyexperts_jax.ops.expert_mlp.gpu_passes import (
    GpuOptions,
    Kernels,
    forward,
    gate_up,
    rows_backward,
    weights_backward,
)
from anyexperts_jax.ops.expert_mlp.gpu_rows import capacity_rows
from anyexperts_jax.ops.expert_mlp.gpu_tile_table import tiles_for
from anyexperts_jax.ops.expert_mlp.gpu_tiles import GpuShape


def triton_options(w_EDF: Float[Array, "E D F"], options: GpuOptions) -> GpuOptions:
    """`options` with the tiles for these experts.

    Raises:
      UserError: without an NVIDIA GPU, or for a dtype the kernels do not support.
    """
    if not options.interpret:
        require_nvidia("pallas_triton")
    check_dtype("pallas_triton", w_EDF.dtype, (jnp.bfloat16, jnp.float32), instead="xla")
    return _with_tiles("pallas_triton", w_EDF, options)


def mosaic_options(w_EDF: Float[Array, "E D F"], options: GpuOptions) -> GpuOptions:
    """`options` with the tiles for these experts.

    Raises:
      UserError: with a JAX before 0.11, without a Hopper GPU, or for a dtype the kernels do not support.
    """
    version = jax.__version__
    require(
        jax.__version_info__ >= (0, 11),
        f"implementation='pallas_gpu' needs JAX 0.11 and this is {version}; upgrade it or use 'pallas_triton'",
    )
    if not options.interpret:
        require_hopper("pallas_gpu")
    check_dtype("pallas_gpu", w_EDF.dtype, (jnp.bfloat16,), instead="pallas_triton")
    return _with_tiles("pallas_gpu", w_EDF, options)


def _with_tiles(implementation: str, w_EDF: Float[Array, "E D F"], options: GpuOptions) -> GpuOptions:
    _, width, hidden = w_EDF.shape
    shape = GpuShape(width, hidden, w_EDF.dtype.itemsize)
    return dataclasses.replace(options, tiles=options.tiles or tiles_for(implementation, gpu_kind(), shape))


def expert_mlp_triton(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    options: GpuOptions = GpuOptions(),  # noqa: B008, immutable
) -> Float[Array, "E C D"]:
    """`expert_mlp` by the Pallas Triton kernels.

    Raises:
      UserError: without an NVIDIA GPU, or for a dtype the kernels do not support.
    """
    options = triton_options(w_gate_EDF, options)
    return _triton(x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD, options)


def expert_mlp_mosaic(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    options: GpuOptions = GpuOptions(),  # noqa: B008, immutable
) -> Float[Array, "E C D"]:
    """`expert_mlp` by the Pallas Mosaic GPU kernels. Operands are copied to pad C to a multiple of 8, D and F to 64.

    Raises:
      UserError: with a JAX before 0.11, without a Hopper GPU, or for a dtype the kernels do not support.
    """
    options = mosaic_options(w_gate_EDF, options)
    rows, width = pallas_gpu.ROW_MULTIPLE, pallas_gpu.WIDTH_MULTIPLE
    weights = (pad_to_multiples(w, (1, width, width)) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
    y_ECD = _mosaic(pad_to_multiples(x_ECD, (1, rows, width)), counts_E, *weights, options)
    return y_ECD[:, : x_ECD.shape[1], : x_ECD.shape[2]]


def differentiable(kernels: Kernels) -> Any:
    """`expert_mlp` with its backward pass, as a function of the five operands and `GpuOptions` with tiles."""

    def run(x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD, options):  # type: ignore[no-untyped-def]
        experts = (w_gate_EDF, w_up_EDF, w_down_EFD)
        rows = capacity_rows(counts_E, x_ECD.shape[1])
        return forward(kernels, x_ECD, rows, experts, options, keep=False, zeros=True)[0]

    def run_forward(x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD, options):  # type: ignore[no-untyped-def]
        experts, keep = (w_gate_EDF, w_up_EDF, w_down_EFD), options.residuals == "saved"
        rows = capacity_rows(counts_E, x_ECD.shape[1])
        y_ECD, kept = forward(kernels, x_ECD, rows, experts, options, keep=keep, zeros=True)
        return y_ECD, (x_ECD, rows, experts, kept)

    def run_backward(options, residuals, d_y_ECD):  # type: ignore[no-untyped-def]
        x_ECD, rows, experts, kept = residuals
        kept = kept or gate_up(kernels, x_ECD, rows, experts, options, keep=True)[1:]
        d_x_ECD, d_hidden = rows_backward(kernels, rows, kept, experts, d_y_ECD, options, zeros=True)
        x_ECD, d_y_ECD = kernels.clean(x_ECD, rows), kernels.clean(d_y_ECD, rows)
        return d_x_ECD, None, *weights_backward(kernels, x_ECD, rows, d_hidden, d_y_ECD, options)

    call = Differentiable(run, num_static=1)
    call.defvjp(run_forward, run_backward, refusal=KERNELS_SUPPORT_GRAD_ONLY)
    return call


_triton = differentiable(pallas_triton)
_mosaic = differentiable(pallas_gpu)

"""The GPU kernels as differentiable implementations of `expert_mlp`."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._checks import check_dtype, check_residuals
from anyexperts_jax.ops._gpu import gpu_kind, require_hopper, require_nvidia
from anyexperts_jax.ops._padding import pad_to_multiples
from anyexperts_jax.ops.expert_mlp import pallas_gpu, pallas_triton
from anyexperts_jax.ops.expert_mlp.gpu_tiles import Tiles


@dataclasses.dataclass(frozen=True)
class GpuOptions:
    """How the kernels run.

    tiles: of the module's kind; None chooses them by dtype and GPU.
    residuals: "saved" keeps gate and up for the backward pass, 2 * E * C * F elements of x's dtype; "recomputed" keeps
      nothing but the operands and computes both again, 2 of the backward pass's then 8 matmuls.
    interpret: on the CPU, for tests: True for Triton, `InterpretGPUParams` for Mosaic.
    """

    tiles: Tiles | None = None
    residuals: str = "saved"
    interpret: Any = False

    def __post_init__(self) -> None:
        check_residuals(self.residuals)


@runtime_checkable
class Kernels(Protocol):
    """What a module of kernels offers: five functions that know nothing of derivatives."""

    gate_up: Any
    down: Any
    d_gate_up: Any
    d_x: Any
    d_weights: Any


def expert_mlp_triton(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    options: GpuOptions = GpuOptions(),
) -> Float[Array, "E C D"]:
    """`expert_mlp` by the Pallas Triton kernels.

    Raises:
      UserError: no NVIDIA GPU to run on, or a dtype the kernels do not take.
    """
    if not options.interpret:
        require_nvidia("pallas_triton")
    check_dtype("pallas_triton", x_ECD.dtype, (jnp.bfloat16, jnp.float32), instead="xla")
    tiles = options.tiles or pallas_triton.default_tiles(x_ECD.dtype, gpu_kind())
    return _triton(
        x_ECD, counts_E.astype(jnp.int32), w_gate_EDF, w_up_EDF, w_down_EFD, dataclasses.replace(options, tiles=tiles)
    )


def expert_mlp_mosaic(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    options: GpuOptions = GpuOptions(),
) -> Float[Array, "E C D"]:
    """`expert_mlp` by the Pallas Mosaic GPU kernels. C that is no multiple of 8, or D or F of 64, costs padded copies.

    Raises:
      UserError: a JAX before 0.12, no Hopper GPU to run on, or a dtype the kernels do not take.
    """
    version = jax.__version__
    require(
        jax.__version_info__ >= (0, 12),
        f"implementation='pallas_gpu' needs JAX 0.12 and this is {version}; upgrade it or use 'pallas_triton'",
    )
    if not options.interpret:
        require_hopper("pallas_gpu")
    check_dtype("pallas_gpu", x_ECD.dtype, (jnp.bfloat16,), instead="pallas_triton")
    options = dataclasses.replace(options, tiles=options.tiles or pallas_gpu.TILES)
    rows, width = pallas_gpu.ROW_MULTIPLE, pallas_gpu.WIDTH_MULTIPLE
    weights = (pad_to_multiples(w, (1, width, width)) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
    y_ECD = _mosaic(pad_to_multiples(x_ECD, (1, rows, width)), counts_E.astype(jnp.int32), *weights, options)
    return y_ECD[:, : x_ECD.shape[1], : x_ECD.shape[2]]


def differentiable(kernels: Kernels) -> Any:
    """`expert_mlp` with its derivative: a function of the five operands and `GpuOptions` whose tiles are chosen."""

    def run(x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD, options):  # type: ignore[no-untyped-def]
        (hidden_ECF,) = gate_up(x_ECD, counts_E, w_gate_EDF, w_up_EDF, options, keep=False)
        return down(hidden_ECF, counts_E, w_down_EFD, options)

    def gate_up(x_ECD, counts_E, w_gate_EDF, w_up_EDF, options, *, keep):  # type: ignore[no-untyped-def]
        tile = options.tiles.gate_up
        return kernels.gate_up(x_ECD, counts_E, w_gate_EDF, w_up_EDF, tile=tile, keep=keep, interpret=options.interpret)

    def down(hidden_ECF, counts_E, w_down_EFD, options):  # type: ignore[no-untyped-def]
        return kernels.down(hidden_ECF, counts_E, w_down_EFD, tile=options.tiles.down, interpret=options.interpret)

    def forward(x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD, options):  # type: ignore[no-untyped-def]
        keep = options.residuals == "saved"
        hidden_ECF, *kept = gate_up(x_ECD, counts_E, w_gate_EDF, w_up_EDF, options, keep=keep)
        y_ECD = down(hidden_ECF, counts_E, w_down_EFD, options)
        return y_ECD, (x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD, tuple(kept))

    def backward(options, residuals, d_y_ECD):  # type: ignore[no-untyped-def]
        x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD, kept = residuals
        tiles, how = options.tiles, {"interpret": options.interpret}
        if not kept:
            _, *kept = gate_up(x_ECD, counts_E, w_gate_EDF, w_up_EDF, options, keep=True)
        hidden_ECF, *d_ECF = kernels.d_gate_up(d_y_ECD, counts_E, w_down_EFD, *kept, tile=tiles.d_gate_up, **how)
        d_x_ECD = kernels.d_x(*d_ECF, counts_E, w_gate_EDF, w_up_EDF, tile=tiles.d_x, **how)
        d_inputs = kernels.d_weights(x_ECD, counts_E, *d_ECF, tile=tiles.d_w_gate_up, **how)
        d_down = kernels.d_weights(hidden_ECF, counts_E, d_y_ECD, tile=tiles.d_w_down, **how)
        return d_x_ECD, None, *d_inputs, *d_down

    call = jax.custom_vjp(run, nondiff_argnums=(5,))
    call.defvjp(forward, backward)
    return call


_triton = differentiable(pallas_triton)
_mosaic = differentiable(pallas_gpu)

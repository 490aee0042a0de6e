"""The TPU kernels as one differentiable function of operands of any size."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.hardware import tpu_limits
from anyexperts_jax.ops._checks import KERNELS_SUPPORT_GRAD_ONLY, check_dtype, check_residuals
from anyexperts_jax.ops._padding import pad_to_multiples
from anyexperts_jax.ops._select import device_kind, platform
from anyexperts_jax.ops.expert_mlp import pallas_tpu
from anyexperts_jax.ops.expert_mlp.tpu_size_table import sizes_for
from anyexperts_jax.ops.expert_mlp.tpu_sizes import Shape, TpuSizes

DTYPES = (jnp.bfloat16, jnp.float32)
LANES, _SUBLANES = 128, 16


@dataclasses.dataclass(frozen=True)
class TpuOptions:
    """How the kernels run.

    residuals: "saved" keeps gate and up for the backward pass, 2 * E * C * F elements of x's dtype; "recomputed" keeps
      only the operands and recomputes both, which are 2 of the 8 matmuls of the backward pass then.
    sizes: None takes those of the chip's table, or of the heuristic if the table does not cover the shape.
    interpret: pltpu.InterpretParams runs the kernels on a CPU, for tests.
    """

    residuals: str = "saved"
    sizes: TpuSizes | None = None
    interpret: Any = False

    def __post_init__(self) -> None:
        check_residuals(self.residuals)


def expert_mlp_pallas_tpu(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    options: TpuOptions = TpuOptions(),
) -> Float[Array, "E C D"]:
    """`expert_mlp` by the kernels. Operands are copied to pad D and F to multiples of 128 and C to one of 16.

    Raises:
      UserError: without a TPU, for a dtype the kernels do not support, or if no part of the weights fits in VMEM.
    """
    require_kernels(x_ECD.dtype, options)
    return _expert_mlp(x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD, options)


def require_kernels(dtype: jnp.dtype, options: TpuOptions) -> None:
    """Raises `UserError` unless the kernels support `dtype` and the current trace is for a TPU."""
    require(
        bool(options.interpret) or platform() == "tpu",
        f"implementation='pallas_tpu' needs a TPU and the platform is {platform()!r}; use implementation='xla'",
    )
    check_dtype("pallas_tpu", dtype, DTYPES, instead="xla")


@functools.partial(Differentiable, num_static=1)
def _expert_mlp(
    x_ECD: Array, counts_E: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array, options: TpuOptions
) -> Array:
    return _run(x_ECD, counts_E, (w_gate_EDF, w_up_EDF, w_down_EFD), options, keep=False)[0]


def _forward(
    x_ECD: Array, counts_E: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array, options: TpuOptions
) -> tuple[Array, tuple]:
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    y_ECD, kept = _run(x_ECD, counts_E, weights, options, keep=options.residuals == "saved")
    return y_ECD, (x_ECD, counts_E, weights, kept)


def _backward(options: TpuOptions, residuals: tuple, d_y_ECD: Array) -> tuple[Array | None, ...]:
    x_ECD, counts_E, weights, kept = residuals
    shapes = [a.shape for a in (x_ECD, *weights)]
    x_ECD, d_y_ECD = _pad_rows(x_ECD), _pad_rows(d_y_ECD.astype(x_ECD.dtype))
    weights = tuple(pad_to_multiples(w, (1, LANES, LANES)) for w in weights)
    how: dict[str, Any] = {"sizes": _sizes(x_ECD, weights[0], options), "interpret": options.interpret}
    d_x_ECD, d_hidden = pallas_tpu.rows_backward(x_ECD, counts_E, kept, *weights, d_y_ECD=d_y_ECD, **how)
    d_weights = pallas_tpu.weights_backward(x_ECD, counts_E, *d_hidden, d_y_ECD=d_y_ECD, **how)
    gradients = [_cut(a, shape) for a, shape in zip((d_x_ECD, *d_weights), shapes, strict=True)]
    return gradients[0], None, *gradients[1:]


_expert_mlp.defvjp(_forward, _backward, refusal=KERNELS_SUPPORT_GRAD_ONLY)


def _run(
    x_ECD: Array, counts_E: Array, weights: tuple[Array, ...], options: TpuOptions, *, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """(y_ECD, padded gate and up if `keep`)."""
    shape, x_ECD = x_ECD.shape, _pad_rows(x_ECD)
    weights = tuple(pad_to_multiples(w, (1, LANES, LANES)) for w in weights)
    sizes = _sizes(x_ECD, weights[0], options)
    y_ECD, kept = pallas_tpu.forward(x_ECD, counts_E, *weights, sizes=sizes, keep=keep, interpret=options.interpret)
    return _cut(y_ECD, shape), kept


def _sizes(x_ECD: Array, w_gate_EDF: Array, options: TpuOptions) -> TpuSizes:
    """The sizes of the options, or else those for the chip that the trace is for."""
    if options.sizes is not None:
        return options.sizes
    _, capacity, width = x_ECD.shape
    shape = Shape(capacity, width, w_gate_EDF.shape[2], x_ECD.dtype.itemsize)
    return sizes_for(tpu_limits(device_kind()), shape)


def _pad_rows(a_ECD: Array) -> Array:
    return pad_to_multiples(a_ECD, (1, _SUBLANES, LANES))


def _cut(a: Array, shape: tuple[int, ...]) -> Array:
    return a if a.shape == shape else a[tuple(slice(size) for size in shape)]

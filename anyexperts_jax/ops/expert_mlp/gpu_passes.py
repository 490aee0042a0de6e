"""The forward and backward pass as sequences of the six GPU kernels, over either kind of rows (`gpu_rows`)."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from anyexperts_jax.ops._checks import check_residuals
from anyexperts_jax.ops.expert_mlp.gpu_rows import GpuRows, TokenRows

Experts = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


@dataclasses.dataclass(frozen=True)
class GpuOptions:
    """How the kernels run.

    tiles: `Tiles` of the module's kind; None looks them up by GPU, widths and dtype.
    residuals: "saved" keeps gate and up for the backward pass, 2 * E * C * F elements of x's dtype; "recomputed" keeps
      only the operands and recomputes both, which are 2 of the 8 matmuls of the backward pass then.
    interpret: runs the kernels on a CPU, for tests: True for Triton, `InterpretGPUParams` for Mosaic.
    """

    tiles: Any = None
    residuals: str = "saved"
    interpret: Any = False

    def __post_init__(self) -> None:
        check_residuals(self.residuals)


@runtime_checkable
class Kernels(Protocol):
    """The functions of a module of kernels. None of them knows about derivatives."""

    gate_up: Any
    down: Any
    d_gate_up: Any
    d_x: Any
    d_weights: Any
    clean: Any


def gate_up(
    kernels: Kernels,
    x_BCD: Float[Array, "B C D"] | TokenRows,
    rows: GpuRows,
    experts: Experts,
    options: GpuOptions,
    *,
    keep: bool,
) -> tuple[Float[Array, "B C F"], ...]:
    """(hidden,), or (hidden, gate, up) if `keep`."""
    how = {"tile": options.tiles.gate_up, "interpret": options.interpret}
    return kernels.gate_up(x_BCD, rows, *experts[:2], keep=keep, **how)


def forward(
    kernels: Kernels,
    x_BCD: Float[Array, "B C D"] | TokenRows,
    rows: GpuRows,
    experts: Experts,
    options: GpuOptions,
    *,
    keep: bool,
    zeros: bool,
) -> tuple[Float[Array, "B C D"], tuple[Float[Array, "B C F"], ...]]:
    """(y, (gate, up) if `keep`). Dead rows of y are zero if `zeros`, else undefined."""
    hidden_BCF, *kept = gate_up(kernels, x_BCD, rows, experts, options, keep=keep)
    how = {"tile": options.tiles.down, "zeros": zeros, "interpret": options.interpret}
    return kernels.down(hidden_BCF, rows, experts[2], **how), tuple(kept)


def rows_backward(
    kernels: Kernels,
    rows: GpuRows,
    kept: tuple[Float[Array, "B C F"], ...],
    experts: Experts,
    d_y_BCD: Float[Array, "B C D"] | TokenRows,
    options: GpuOptions,
    *,
    zeros: bool,
) -> tuple[Float[Array, "B C D"], tuple[Float[Array, "B C F"], ...]]:
    """(gradient of x, (gradient of gate, gradient of up, hidden)). Dead rows of the first are zero if `zeros`."""
    w_gate_EDF, w_up_EDF, w_down_EFD = experts
    tiles, how = options.tiles, {"interpret": options.interpret}
    hidden_BCF, *d_BCF = kernels.d_gate_up(d_y_BCD, rows, w_down_EFD, *kept, tile=tiles.d_gate_up, **how)
    d_x_BCD = kernels.d_x(*d_BCF, rows, w_gate_EDF, w_up_EDF, tile=tiles.d_x, zeros=zeros, **how)
    return d_x_BCD, (*d_BCF, hidden_BCF)


def weights_backward(
    kernels: Kernels,
    x_ERD: Float[Array, "_ R D"] | TokenRows,
    rows: GpuRows,
    d_hidden: tuple[Float[Array, "_ R F"], ...],
    d_y_ERD: Float[Array, "_ R D"] | TokenRows,
    options: GpuOptions,
) -> Experts:
    """Gradients of the experts' weights, from the results of `kernels.clean` and `rows_backward`."""
    tiles, how = options.tiles, {"interpret": options.interpret}
    *d_ERF, hidden_ERF = d_hidden
    d_gate_EDF, d_up_EDF = kernels.d_weights(x_ERD, rows, *d_ERF, tile=tiles.d_w_gate_up, **how)
    (d_down_EFD,) = kernels.d_weights(hidden_ERF, rows, d_y_ERD, tile=tiles.d_w_down, **how)
    return d_gate_EDF, d_up_EDF, d_down_EFD

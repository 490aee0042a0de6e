"""Argument checks shared by the ops over expert weights."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from anyexperts_jax.core.arrays import FLOATS
from anyexperts_jax.core.errors import comma_list, require, require_one_of

KERNELS_SUPPORT_GRAD_ONLY = (
    "the Pallas implementations support first-order reverse mode (jax.grad) only; for jvp, jacfwd, hessian or "
    "gradients of gradients use implementation='xla' or implementation='reference'"
)
RESIDUALS = ("saved", "recomputed")


def check_expert_weights(x: Array, w_gate: Array, w_up: Array, w_down: Array) -> None:
    """Raises `UserError` unless the weights are [E, D, F], [E, D, F] and [E, F, D], with x's width D and dtype."""
    weights = {"w_gate_EDF": w_gate, "w_up_EDF": w_up, "w_down_EFD": w_down}
    require(x.dtype.name in FLOATS, f"x is {x.dtype}; it must be one of {comma_list(FLOATS)}: cast it")
    for name, weight in weights.items():
        require(weight.dtype == x.dtype, f"{name} is {weight.dtype} and x is {x.dtype}; cast one of them")
    require(w_gate.ndim == 3, f"w_gate_EDF has shape {w_gate.shape}; it must be [E, D, F]")
    experts, width, hidden = w_gate.shape
    require(w_up.shape == w_gate.shape, f"w_up_EDF has shape {w_up.shape}, w_gate_EDF {w_gate.shape}; must be equal")
    require(
        w_down.shape == (experts, hidden, width),
        f"w_down_EFD has shape {w_down.shape}; w_gate_EDF {w_gate.shape} asks for {(experts, hidden, width)}",
    )
    require(x.shape[-1] == width, f"x has width {x.shape[-1]}, the experts {width}")


def check_stacked_experts(x: Array, w_gate: Array, multiple: int = 1) -> None:
    """Raises `UserError` unless a kernel can read the weights of all layers as they are, without a copy."""
    require(w_gate.dtype == x.dtype, f"w_gate_EDF is {w_gate.dtype} and x is {x.dtype}; cast one of them")
    width, hidden = w_gate.shape[1:]
    whole = width % multiple == 0 and hidden % multiple == 0
    require(whole, f"D={width} and F={hidden} must be multiples of {multiple} for experts that are read in place")


def check_counts(name: str, counts: Array, num_experts: int) -> None:
    """Raises `UserError` unless `counts` is a vector of one integer per expert."""
    require(
        counts.shape == (num_experts,) and jnp.issubdtype(counts.dtype, jnp.integer),
        f"{name} is {counts.dtype}{list(counts.shape)}; it must hold {num_experts} integers",
    )


def check_dtype(implementation: str, dtype: jnp.dtype, valid: tuple[Any, ...], *, instead: str) -> None:
    """Raises `UserError` unless `dtype` is one of `valid`; the message suggests the implementation `instead`."""
    names = " or ".join(jnp.dtype(d).name for d in valid)
    require(
        dtype in valid,
        f"implementation={implementation!r} takes {names} and x is {dtype}; cast it or use implementation={instead!r}",
    )


def check_residuals(residuals: str) -> None:
    """Raises `UserError` unless `residuals` is "saved" or "recomputed"."""
    require_one_of("residuals", residuals, RESIDUALS)

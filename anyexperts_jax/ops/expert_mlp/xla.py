"""Dots batched over the experts: XLA reads each weight once and runs the experts in parallel."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops._dots import dot, row_contraction
from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp
from anyexperts_jax.ops.expert_mlp.reference import live_rows

Residuals = tuple[Array, ...]


def forward(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
) -> tuple[Float[Array, "E C D"], Residuals]:
    """(y_ECD, the residuals for `backward`). Dead rows are zeroed on input, so their results are zero."""
    x_ECD = jnp.where(live_rows(counts_E, x_ECD.shape[1]), x_ECD, 0)
    gate_ECF = dot("ECD,EDF->ECF", x_ECD, w_gate_EDF)
    up_ECF = dot("ECD,EDF->ECF", x_ECD, w_up_EDF)
    y_ECD = dot("ECF,EFD->ECD", swiglu(gate_ECF, up_ECF, x_ECD.dtype), w_down_EFD).astype(x_ECD.dtype)
    gate_ECF, up_ECF = gate_ECF.astype(x_ECD.dtype), up_ECF.astype(x_ECD.dtype)  # halves the residuals of bfloat16
    return y_ECD, (x_ECD, counts_E, gate_ECF, up_ECF, w_gate_EDF, w_up_EDF, w_down_EFD)


def backward(
    residuals: Residuals, d_y_ECD: Float[Array, "E C D"]
) -> tuple[Float[Array, "E C D"], Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]:
    """Gradients of x and the three weights."""
    x_ECD, counts_E, gate_ECF, up_ECF, w_gate_EDF, w_up_EDF, w_down_EFD = residuals
    d_y_ECD = jnp.where(live_rows(counts_E, d_y_ECD.shape[1]), d_y_ECD, 0)
    d_hidden_ECF = dot("ECD,EFD->ECF", d_y_ECD, w_down_EFD)
    gradients = (a.astype(x_ECD.dtype) for a in swiglu_vjp(gate_ECF, up_ECF, d_hidden_ECF))
    hidden_ECF, d_gate_ECF, d_up_ECF = gradients
    d_x_ECD = dot("ECF,EDF->ECD", d_gate_ECF, w_gate_EDF) + dot("ECF,EDF->ECD", d_up_ECF, w_up_EDF)
    d_w_gate_EDF, d_w_up_EDF = row_contraction(x_ECD, d_gate_ECF), row_contraction(x_ECD, d_up_ECF)
    d_w_down_EFD = row_contraction(hidden_ECF, d_y_ECD)
    d_x_ECD, d_w_gate_EDF, d_w_up_EDF, d_w_down_EFD = (
        a.astype(x_ECD.dtype) for a in (d_x_ECD, d_w_gate_EDF, d_w_up_EDF, d_w_down_EFD)
    )
    return d_x_ECD, d_w_gate_EDF, d_w_up_EDF, d_w_down_EFD

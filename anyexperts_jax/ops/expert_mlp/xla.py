"""Batched dots over the experts: XLA reads each weight once and runs the experts in parallel."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops._dots import row_contraction
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
    """(y_ECD, what `backward` needs). Dead rows enter as zeros, so they leave as zeros."""
    x_ECD = jnp.where(live_rows(counts_E, x_ECD.shape[1]), x_ECD, 0)
    gate_ECF = jnp.einsum("ECD,EDF->ECF", x_ECD, w_gate_EDF)
    up_ECF = jnp.einsum("ECD,EDF->ECF", x_ECD, w_up_EDF)
    y_ECD = jnp.einsum("ECF,EFD->ECD", swiglu(gate_ECF, up_ECF, x_ECD.dtype), w_down_EFD)
    return y_ECD, (x_ECD, counts_E, gate_ECF, up_ECF, w_gate_EDF, w_up_EDF, w_down_EFD)


def backward(
    residuals: Residuals, d_y_ECD: Float[Array, "E C D"]
) -> tuple[Float[Array, "E C D"], Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]:
    """Gradients of x and the three weights."""
    x_ECD, counts_E, gate_ECF, up_ECF, w_gate_EDF, w_up_EDF, w_down_EFD = residuals
    d_y_ECD = jnp.where(live_rows(counts_E, d_y_ECD.shape[1]), d_y_ECD, 0)
    d_hidden_ECF = jnp.einsum("ECD,EFD->ECF", d_y_ECD, w_down_EFD)
    hidden_ECF, d_gate_ECF, d_up_ECF = swiglu_vjp(gate_ECF, up_ECF, d_hidden_ECF, x_ECD.dtype)
    d_x_ECD = jnp.einsum("ECF,EDF->ECD", d_gate_ECF, w_gate_EDF) + jnp.einsum("ECF,EDF->ECD", d_up_ECF, w_up_EDF)
    return (
        d_x_ECD,
        row_contraction(x_ECD, d_gate_ECF),
        row_contraction(x_ECD, d_up_ECF),
        row_contraction(hidden_ECF, d_y_ECD),
    )

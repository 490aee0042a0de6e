"""The XLA implementation with its own derivative."""

import jax
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops.grouped_mlp import xla


@jax.custom_vjp
def grouped_mlp_xla(
    x_RD: Float[Array, "R D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
) -> Float[Array, "R D"]:
    return xla.forward(x_RD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)[0]


def _backward(residuals: xla.Residuals, d_y_RD: Float[Array, "R D"]) -> tuple[Array | None, ...]:
    d_x_RD, *d_weights = xla.backward(residuals, d_y_RD)
    return d_x_RD, None, *d_weights


grouped_mlp_xla.defvjp(xla.forward, _backward)

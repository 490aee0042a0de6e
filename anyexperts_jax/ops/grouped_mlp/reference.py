"""The definition, with JAX's own derivative: every expert over all rows, its own kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops._swiglu import accumulator_dtype, swiglu


def grouped_mlp(
    x_RD: Float[Array, "R D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
) -> Float[Array, "R D"]:
    wide = accumulator_dtype(x_RD.dtype)
    ends_E = jnp.cumsum(counts_E)
    row_R = jnp.arange(x_RD.shape[0])

    def add_expert(y_RD: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        start, end, w_gate_DF, w_up_DF, w_down_FD = expert
        own_R1 = ((row_R >= start) & (row_R < end))[:, None]
        own_RD = jnp.where(own_R1, x_RD, 0)
        gate_RF = jnp.einsum("RD,DF->RF", own_RD, w_gate_DF, preferred_element_type=wide)
        up_RF = jnp.einsum("RD,DF->RF", own_RD, w_up_DF, preferred_element_type=wide)
        hidden_RF = swiglu(gate_RF, up_RF, x_RD.dtype)
        own_y_RD = jnp.einsum("RF,FD->RD", hidden_RF, w_down_FD, preferred_element_type=wide)
        return jnp.where(own_R1, own_y_RD.astype(y_RD.dtype), y_RD), None

    experts = (ends_E - counts_E, ends_E, w_gate_EDF, w_up_EDF, w_down_EFD)
    return jax.lax.scan(add_expert, jnp.zeros_like(x_RD), experts)[0]

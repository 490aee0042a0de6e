"""The definition of the op over both kinds of buffer, with JAX's own derivatives."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.arrays import zeros_varying_as
from anyexperts_jax.ops._dots import dot, wide_dtype
from anyexperts_jax.ops._swiglu import swiglu


def live_rows(counts_E: Int[Array, "E"], capacity: int) -> Bool[Array, "E C 1"]:
    """True for the rows below each expert's count."""
    return (jnp.arange(capacity, dtype=jnp.int32)[None] < counts_E[:, None])[..., None]


def expert_mlp(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
) -> Float[Array, "E C D"]:
    live_EC1 = live_rows(counts_E, x_ECD.shape[1])
    x_ECD = jnp.where(live_EC1, x_ECD, 0)
    gate_ECF = dot("ECD,EDF->ECF", x_ECD, w_gate_EDF)
    up_ECF = dot("ECD,EDF->ECF", x_ECD, w_up_EDF)
    hidden_ECF = swiglu(gate_ECF, up_ECF, x_ECD.dtype)
    y_ECD = dot("ECF,EFD->ECD", hidden_ECF, w_down_EFD)
    return jnp.where(live_EC1, y_ECD, 0).astype(x_ECD.dtype)


def aligned_mlp(
    x_RD: Float[Array, "R D"],
    starts_E: Int[Array, "E"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
) -> Float[Array, "R D"]:
    """Applies expert e to rows starts_E[e] to starts_E[e] + counts_E[e] of one buffer: to all rows, keeping its own."""
    row_R1 = jnp.arange(x_RD.shape[0], dtype=jnp.int32)[:, None]

    def add_expert(y_RD: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        start, count, w_gate_DF, w_up_DF, w_down_FD = expert
        own_R1 = (row_R1 >= start) & (row_R1 < start + count)
        own_RD = jnp.where(own_R1, x_RD, 0)
        hidden_RF = swiglu(dot("RD,DF->RF", own_RD, w_gate_DF), dot("RD,DF->RF", own_RD, w_up_DF), x_RD.dtype)
        return jnp.where(own_R1, dot("RF,FD->RD", hidden_RF, w_down_FD), y_RD), None

    zeros_RD = zeros_varying_as(x_RD, x_RD.shape, wide_dtype(x_RD.dtype))
    y_RD, _ = jax.lax.scan(add_expert, zeros_RD, (starts_E, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD))
    return y_RD.astype(x_RD.dtype)

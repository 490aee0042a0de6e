"""The definition, with JAX's own derivative."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.ops._dots import dot
from anyexperts_jax.ops._swiglu import swiglu


def live_rows(counts_E: Int[Array, "E"], capacity: int) -> Bool[Array, "E C 1"]:
    """True at the rows below each expert's count."""
    return (jnp.arange(capacity) < counts_E[:, None])[..., None]


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

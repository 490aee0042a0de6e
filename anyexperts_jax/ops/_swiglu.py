"""The gated activation between an expert's matmuls, computed in float32 or wider."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.ops._dots import wide_dtype


def swiglu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], dtype: jnp.dtype) -> Float[Array, "*rows F"]:
    """silu(gate) * up, computed wide and rounded to `dtype` once."""
    wide = wide_dtype(dtype)
    return (jax.nn.silu(gate.astype(wide)) * up.astype(wide)).astype(dtype)


def swiglu_vjp(
    gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], cotangent: Float[Array, "*rows F"]
) -> tuple[Float[Array, "*rows F"], Float[Array, "*rows F"], Float[Array, "*rows F"]]:
    """(silu(gate) * up, gradient of gate, gradient of up), in `wide_dtype`: the caller rounds."""
    wide = wide_dtype(gate.dtype)
    gate, up = gate.astype(wide), up.astype(wide)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu

"""The gated activation between the two matmuls of an expert, computed in float32 at least."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for float32 and narrower, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def swiglu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], dtype: jnp.dtype) -> Float[Array, "*rows F"]:
    """silu(gate) * up, rounded to `dtype` once."""
    wide = accumulator_dtype(dtype)
    return (jax.nn.silu(gate.astype(wide)) * up.astype(wide)).astype(dtype)


def swiglu_vjp(
    gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], cotangent: Float[Array, "*rows F"], dtype: jnp.dtype
) -> tuple[Float[Array, "*rows F"], Float[Array, "*rows F"], Float[Array, "*rows F"]]:
    """(silu(gate) * up, gradient of gate, gradient of up), each rounded to `dtype` once."""
    wide = accumulator_dtype(dtype)
    gate, up, cotangent = gate.astype(wide), up.astype(wide), cotangent.astype(wide)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = cotangent * up * (sigmoid + silu * (1 - sigmoid))
    return (silu * up).astype(dtype), d_gate.astype(dtype), (cotangent * silu).astype(dtype)

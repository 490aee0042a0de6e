"""Token importance, and the hidden-state modulation through which it gets a gradient from the task loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.batch import ArrayLike


def importance(logits_N: Float[ArrayLike, "*N"]) -> Float[Array, "*N"]:
    """w = sigmoid(z), in float32 (AnyExperts section 2, step 2)."""
    return jax.nn.sigmoid(jnp.asarray(logits_N, jnp.float32))


def modulate(
    hidden_ND: Float[ArrayLike, "*N D"], importance_N: Float[ArrayLike, "*N"], alpha: float
) -> Float[Array, "*N D"]:
    """h' = h + alpha * w * h (AnyExperts: hidden-state modulation), in h's dtype.

    The factor 1 + alpha w is applied in float32: for alpha = 0.01, bfloat16 has only two values in its range.
    """
    hidden_ND = jnp.asarray(hidden_ND)
    factor_N1 = 1.0 + alpha * jnp.asarray(importance_N, jnp.float32)[..., None]
    return (hidden_ND.astype(jnp.float32) * factor_N1).astype(hidden_ND.dtype)

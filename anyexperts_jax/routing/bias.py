"""Loss-free load balancing: the expert bias is updated by a rule, not by a gradient."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.batch import ArrayLike


def update_expert_bias(
    bias_C: Float[ArrayLike, "*L C"], load_C: Float[ArrayLike, "*L C"], rate: float
) -> Float[Array, "*L C"]:
    """b += rate * sign(mean load - load) over all columns, real and virtual (Ling-mini-2.0's rule, rate 0.001).

    Leading axes are layers. `load_C` is metrics["load_C"], summed over the micro-batches of the step. A step without
    valid tokens changes nothing.
    """
    bias_C, load_C = jnp.asarray(bias_C, jnp.float32), jnp.asarray(load_C, jnp.float32)
    return bias_C + rate * jnp.sign(load_C.mean(axis=-1, keepdims=True) - load_C)

"""Dots in the layouts XLA's CPU backend is fast at."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def row_contraction(a: Float[Array, "*E C I"], b: Float[Array, "*E C J"]) -> Float[Array, "*E I J"]:
    """a^T b over the rows of each expert: a weight gradient."""
    return jnp.einsum("...CI,...CJ->...IJ", a, b)

"""Zeros around operands whose sizes a kernel cannot take."""

import jax.numpy as jnp
from jax import Array


def pad_to_multiples(a: Array, multiples: tuple[int, ...]) -> Array:
    """Zeros up to the next multiples, one a dimension; the array itself where it has them."""
    extra = [-size % multiple for size, multiple in zip(a.shape, multiples, strict=True)]
    return jnp.pad(a, [(0, n) for n in extra]) if any(extra) else a

"""Zero-pads operands to sizes that a kernel supports."""

import jax.numpy as jnp
from jax import Array


def pad_to_multiples(a: Array, multiples: tuple[int, ...]) -> Array:
    """Zero-pads each dimension to the next multiple of its entry; returns `a` itself if there is nothing to pad."""
    extra = [-size % multiple for size, multiple in zip(a.shape, multiples, strict=True)]
    return jnp.pad(a, [(0, n) for n in extra]) if any(extra) else a

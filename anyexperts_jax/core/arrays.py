"""Arrays as callers hold them: JAX's, NumPy's, or nested lists of numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.errors import UserError, require


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as a JAX array of the dtype JAX gives it: float32 for NumPy's float64 unless x64 is enabled.

    Raises:
      UserError: naming the argument, where it is no array of numbers or bools.
    """
    if isinstance(value, jax.Array):  # tracers too
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UserError(f"{name} is no array: {error}") from error
    number = array.dtype.kind in "biuf" or jnp.issubdtype(array.dtype, jnp.floating)
    require(number, f"{name} holds {array.dtype}; it must be an array of numbers")
    return jnp.asarray(array)

"""Arrays as callers hold them: JAX's, NumPy's, or nested lists of numbers."""

from collections.abc import Sequence
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


def vary_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """`arrays`, each varying over every mesh axis of a `shard_map` that one of them varies over.

    Within `jax.shard_map(check_vma=True)` JAX tracks over which axes a value differs from device to device, and wants
    the two ends of a loop's carry, or an operand and its gradient, to agree. Elsewhere this changes nothing. The
    gradient of an array that became varying here is summed over the axes by JAX.
    """
    axes = [jax.typeof(array).mat.varying for array in arrays]
    every: frozenset[Any] = frozenset().union(*axes)
    return [
        jax.lax.pcast(array, tuple(every - own), to="varying") if every - own else array
        for array, own in zip(arrays, axes, strict=True)
    ]

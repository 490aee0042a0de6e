"""Converts what callers pass (JAX arrays, NumPy arrays, nested lists) to JAX arrays, and checks it."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, one_line, require

T = TypeVar("T")
FLOATS = ("float16", "bfloat16", "float32", "float64")  # what experts compute in


def as_array(name: str, value: Any) -> jax.Array:
    """Converts `value` to a JAX array, by JAX's dtype rules: float64 becomes float32 unless x64 is enabled.

    Raises:
      UserError: naming the argument, if it is not an array of real numbers or bools.
    """
    if not isinstance(value, jax.Array):  # a tracer is a jax.Array and must not reach NumPy
        try:
            value = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} is no array: {one_line(error)}") from error
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    real = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    require(real, f"{name} holds {value.dtype}; it must be an array of real numbers")
    if isinstance(value, jax.Array):
        return value
    if value.dtype.kind in "iu":
        limits = np.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
        fits = not value.size or (limits.min <= value.min() and value.max() <= limits.max)
        require(bool(fits), f"{name} holds integers that {limits.dtype} cannot hold")
    return jnp.asarray(value)


def as_floats(name: str, value: Any) -> jax.Array:
    """`as_array`, which also requires a dtype that experts compute in. Nothing is cast.

    Raises:
      UserError: for any other dtype, such as an integer or an 8-bit float.
    """
    array = as_array(name, value)
    require(array.dtype.name in FLOATS, f"{name} is {array.dtype}; it must be one of {comma_list(FLOATS)}: cast it")
    return array


def require_ids(name: str, array: jax.Array, count: int, meaning: str) -> None:
    """Checks that `array` holds ids in [0, count). Traced values pass: they are not known yet.

    Raises:
      UserError: naming the argument, the first id that is out of range, and `meaning`, what the ids stand for.
    """
    integers = jnp.issubdtype(array.dtype, jnp.integer)
    require(integers, f"{name} is {array.dtype}{list(array.shape)}; it must hold integers")
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable or not array.size:
        return
    ids = np.asarray(array)
    wrong = ids[(ids < 0) | (ids >= count)]
    require(not wrong.size, f"{name} holds {', '.join(map(str, wrong[:1]))}; {meaning}, 0 to {count - 1}")


def vary_alike(arrays: Sequence[Any]) -> list[Any]:
    """Makes `arrays` vary over the same mesh axes of a `shard_map`: all that any of them varies over.

    Within `jax.shard_map(check_vma=True)` JAX tracks the axes over which a value differs from device to device. It
    requires a loop's carry to start and end with the same axes, and an operand and its gradient to agree. Outside of
    `shard_map` this changes nothing. JAX sums the gradient of an array that became varying here over the new axes.
    """
    axes = [jax.typeof(array).mat.varying for array in arrays]
    every: frozenset[Any] = frozenset().union(*axes)
    return [
        jax.lax.pcast(array, tuple(every - own), to="varying") if every - own else array
        for array, own in zip(arrays, axes, strict=True)
    ]


def vary_tree_alike(tree: T, *others: jax.Array) -> T:
    """`vary_alike` for a tree of arrays together with `others`; returns the tree alone."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, vary_alike([*leaves, *others])[: len(leaves)])


def zeros_varying_as(like: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros to start the carry of a loop over parts of `like`, varying over the same axes; see `vary_alike`."""
    return vary_alike([jnp.zeros(shape, dtype), like])[0]

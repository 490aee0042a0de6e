"""`contract`: the dot behind every linear map, with gradients that need no transposition."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.ops._select import platform


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The options of `contract`."""

    num_in: int = 1  # number of contracted axes: the last of x, the first of the kernel
    dtype: str = "float32"  # of both operands
    out_dtype: str = "float32"  # of the result and of its accumulation
    precision: jax.lax.Precision | None = None


@functools.partial(Differentiable, num_static=1)
def contract(x: Float[Array, "..."], kernel: Float[Array, "..."], how: Contraction) -> Float[Array, "..."]:
    """Contracts the last `num_in` axes of x with the first `num_in` axes of the kernel.

    The gradients are dots whose results already have the axes in order, accumulated in float32. JAX's own rule
    transposes the kernel's gradient, which XLA's CPU backend turns into strided copies of activations; an MLP then
    takes twice as long.
    """
    return _forward_dot(x, kernel, how)


def _contract_forward(x: Array, kernel: Array, how: Contraction) -> tuple[Array, tuple[Array, Array]]:
    # Call the dot itself and not `contract`: the "dots" remat policy cannot see dots inside a `Differentiable` call.
    return _forward_dot(x, kernel, how), (x, kernel)


def _contract_backward(how: Contraction, residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    num_out = kernel.ndim - how.num_in
    rows = tuple(range(x.ndim - how.num_in))
    d_x = _dot(d_y, kernel, (_last(d_y, num_out), _last(kernel, num_out)), how, "float32")
    d_kernel = _dot(x, d_y, (rows, rows), how, "float32")
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


def dot_of_rows(x: Array, kernel: Array, axes: tuple[int, ...], how: Contraction) -> Array:
    """Contracts the last `num_in` axes of x with these axes of the kernel. JAX's own rule gives the gradients."""
    if how.dtype != "bfloat16" or platform() != "cpu":
        return _dot(x, kernel, (_last(x, how.num_in), axes), how, how.out_dtype)
    # XLA's CPU backend widens the whole kernel first for a bfloat16 result (JAX 0.10) and for a single row (all
    # versions): a dot of one row, as in decoding, takes three to six times as long as one of two.
    single = x.size == math.prod(kernel.shape[axis] for axis in axes)
    rows = jnp.stack([x, jnp.zeros_like(x)]) if single else x
    wide = _dot(rows, kernel, (_last(rows, how.num_in), axes), how, "float32")
    return (wide[0] if single else wide).astype(how.out_dtype)


def _forward_dot(x: Array, kernel: Array, how: Contraction) -> Array:
    return dot_of_rows(x, kernel, tuple(range(how.num_in)), how)


def _last(array: Array, count: int) -> tuple[int, ...]:
    return tuple(range(array.ndim - count, array.ndim))


def _dot(
    a: Array, b: Array, contracted: tuple[tuple[int, ...], tuple[int, ...]], how: Contraction, out_dtype: str
) -> Array:
    return jax.lax.dot_general(
        a.astype(how.dtype),
        b.astype(how.dtype),
        (contracted, ((), ())),
        precision=how.precision,
        preferred_element_type=jnp.dtype(out_dtype),
    )


contract.defvjp(_contract_forward, _contract_backward, definition=_forward_dot)

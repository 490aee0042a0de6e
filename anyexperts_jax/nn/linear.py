"""Linear maps between named axes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.nn.config import Dtype
from anyexperts_jax.nn.params import AxisNames, Constant, FanIn, named


class Linear(nn.Module):
    """Contracts the last `num_in` axes of x with the kernel's first axes; `out_shape` may be empty (one scalar)."""

    out_shape: tuple[int, ...]
    axes: AxisNames  # of the kernel: inputs, then outputs
    num_in: int = 1
    use_bias: bool = False
    scale: float = 1.0  # of the initial standard deviation, scale / sqrt(fan-in)
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    out_dtype: Dtype | None = None  # None: dtype
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        in_shape = x.shape[x.ndim - self.num_in :]
        init = named(FanIn(self.scale, self.num_in), self.axes)
        kernel = self.param("kernel", init, (*in_shape, *self.out_shape), jnp.dtype(self.param_dtype))
        y = contract(x, kernel, Contraction(self.num_in, self.dtype, self.out_dtype or self.dtype, self.precision))
        if not self.use_bias:
            return y
        bias_init = named(Constant(0.0), self.axes[self.num_in :])
        bias = self.param("bias", bias_init, self.out_shape, jnp.dtype(self.param_dtype))
        return y + bias.astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How `contract` multiplies."""

    num_in: int = 1  # axes contracted: x's last, the kernel's first
    dtype: Dtype = "float32"  # of both operands
    out_dtype: Dtype = "float32"  # of the result and its accumulation
    precision: jax.lax.Precision | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(x: Float[Array, "..."], kernel: Float[Array, "..."], how: Contraction) -> Float[Array, "..."]:
    """x times kernel over x's last and the kernel's first `num_in` axes.

    The gradients are dots in the order of their operands' axes, accumulated in float32. JAX's own rule transposes the
    kernel's gradient, which XLA's CPU backend turns into strided copies of activations: twice the time of an MLP.
    """
    return _forward_dot(x, kernel, how)


def _contract_forward(x: Array, kernel: Array, how: Contraction) -> tuple[Array, tuple[Array, Array]]:
    # The dot itself, not `contract`: remat's "dots" policy sees no dots inside a custom_vjp call.
    return _forward_dot(x, kernel, how), (x, kernel)


def _contract_backward(how: Contraction, residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    num_out = kernel.ndim - how.num_in
    rows = tuple(range(x.ndim - how.num_in))
    d_x = _dot(d_y, kernel, (_last(d_y, num_out), _last(kernel, num_out)), how, "float32")
    d_kernel = _dot(x, d_y, (rows, rows), how, "float32")
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


contract.defvjp(_contract_forward, _contract_backward)


def _forward_dot(x: Array, kernel: Array, how: Contraction) -> Array:
    return _dot(x, kernel, (_last(x, how.num_in), tuple(range(how.num_in))), how, how.out_dtype)


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

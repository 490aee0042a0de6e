"""Linear maps between named axes."""

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
    out_dtype: Dtype | None = None  # of the result and its accumulation; None: dtype
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        in_shape = x.shape[x.ndim - self.num_in :]
        init = named(FanIn(self.scale, self.num_in), self.axes)
        kernel = self.param("kernel", init, (*in_shape, *self.out_shape), jnp.dtype(self.param_dtype))
        contracted = (tuple(range(x.ndim - self.num_in, x.ndim)), tuple(range(self.num_in)))
        y = jax.lax.dot_general(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (contracted, ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.dtype(self.out_dtype or self.dtype),
        )
        if not self.use_bias:
            return y
        bias_init = named(Constant(0.0), self.axes[self.num_in :])
        bias = self.param("bias", bias_init, self.out_shape, jnp.dtype(self.param_dtype))
        return y + bias.astype(y.dtype)

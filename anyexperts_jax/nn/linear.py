"""Linear maps between named axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.initializers import Constant, FanIn
from anyexperts_jax.nn.config import Dtype, LoraConfig
from anyexperts_jax.nn.lora import WeightAxes, low_rank
from anyexperts_jax.nn.params import AxisNames, named
from anyexperts_jax.ops.contraction import Contraction, contract


class Linear(nn.Module):
    """Contracts the last `num_in` axes of x with the kernel's first axes; `out_shape` may be empty (one scalar)."""

    out_shape: tuple[int, ...]
    axes: AxisNames  # of the kernel: inputs, then outputs
    num_in: int = 1
    use_bias: bool = False
    scale: float = 1.0  # the initial standard deviation is scale / sqrt(fan-in)
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    out_dtype: Dtype | None = None  # None: dtype
    precision: jax.lax.Precision | None = None
    lora: LoraConfig | None = None  # gives the map an adapter if a pattern matches; None: never

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        in_shape = x.shape[x.ndim - self.num_in :]
        init = named(FanIn(self.scale, self.num_in), self.axes)
        kernel = self.param("kernel", init, (*in_shape, *self.out_shape), jnp.dtype(self.param_dtype))
        y = contract(x, kernel, Contraction(self.num_in, self.dtype, self.out_dtype or self.dtype, self.precision))
        weight = WeightAxes(kernel.shape, self.axes, self.num_in)
        adapter = low_rank(self, self.lora, "kernel", weight)
        if adapter is not None:
            narrow = contract(x, adapter.a, Contraction(self.num_in, self.dtype, self.dtype, self.precision))
            wide = contract(narrow, adapter.b, Contraction(1, self.dtype, "float32", self.precision))
            y = (y.astype(jnp.float32) + adapter.scale * wide).astype(y.dtype)
        if not self.use_bias:
            return y
        bias_init = named(Constant(0.0), self.axes[self.num_in :])
        bias = self.param("bias", bias_init, self.out_shape, jnp.dtype(self.param_dtype))
        return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)

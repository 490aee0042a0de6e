"""The dense SwiGLU feed-forward network, of dense layers and shared experts."""

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from anyexperts_jax.nn.config import Dtype
from anyexperts_jax.nn.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    d_ff: int
    residual_scale: float = 1.0  # of the down projection's initial values
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        def widen(name: str) -> Linear:
            types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return Linear((self.d_ff,), ("embed", "mlp"), name=name, **types)

        hidden = jax.nn.silu(widen("gate")(x)) * widen("up")(x)
        return Linear(
            x.shape[-1:],
            ("mlp", "embed"),
            scale=self.residual_scale,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="down",
        )(hidden)

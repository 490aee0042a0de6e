"""The dense SwiGLU feed-forward network, of dense layers and shared experts."""

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from anyexperts_jax.nn.config import Dtype
from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    d_ff: int
    residual_scale: float = 1.0  # of the down projection's initial values
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = Linear((self.d_ff,), ("embed", "mlp"), name="gate", **types)(x)
        up = Linear((self.d_ff,), ("embed", "mlp"), name="up", **types)(x)
        down = Linear(x.shape[-1:], ("mlp", "embed"), scale=self.residual_scale, name="down", **types)
        return down(gated(gate, up))


@jax.custom_vjp
def gated(gate: Float[Array, "*rest F"], up: Float[Array, "*rest F"]) -> Float[Array, "*rest F"]:
    """silu(gate) * up, computed in float32 and returned in up's dtype."""
    return swiglu(gate, up, up.dtype)


def _gated_backward(operands: tuple[Array, Array], d_hidden: Array) -> tuple[Array, Array]:
    gate, up = operands
    _, d_gate, d_up = swiglu_vjp(gate, up, d_hidden)
    # Each is read by two dots. Without the barrier XLA's CPU backend computes them anew for both.
    return jax.lax.optimization_barrier((d_gate.astype(gate.dtype), d_up.astype(up.dtype)))


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)

"""Dense feed-forward networks: SwiGLU for dense layers and shared experts, GELU for vision towers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.nn.config import Dtype, LoraConfig
from anyexperts_jax.nn.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases unless asked for."""

    d_ff: int
    residual_scale: float = 1.0  # scale of the down projection's initial values
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    use_bias: bool = False
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "use_bias": self.use_bias}
        types["lora"] = self.lora
        gate = Linear((self.d_ff,), ("embed", "mlp"), name="gate", **types)(x)
        up = Linear((self.d_ff,), ("embed", "mlp"), name="up", **types)(x)
        down = Linear(x.shape[-1:], ("mlp", "embed"), scale=self.residual_scale, name="down", **types)
        return down(gated(gate, up))


class GeluMLP(nn.Module):
    """down(gelu(up(x))) with biases. GELU is computed in float32, exactly or by the usual tanh approximation."""

    d_ff: int
    d_out: int
    exact: bool = False
    residual_scale: float = 1.0  # scale of the down projection's initial values
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D_out"]:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "use_bias": True}
        up = Linear((self.d_ff,), ("embed", "mlp"), name="up", **types)(x)
        hidden = jax.nn.gelu(up.astype(jnp.float32), approximate=not self.exact).astype(up.dtype)
        return Linear((self.d_out,), ("mlp", "embed"), scale=self.residual_scale, name="down", **types)(hidden)


def _plain_gated(gate: Array, up: Array) -> Array:
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


@Differentiable
def gated(gate: Float[Array, "*rest F"], up: Float[Array, "*rest F"]) -> Float[Array, "*rest F"]:
    """silu(gate) * up, computed in float32 and returned in up's dtype."""
    return _plain_gated(gate, up)


def _gated_backward(operands: tuple[Array, Array], d_hidden: Array) -> tuple[Array, Array]:
    _, backward = jax.vjp(_plain_gated, *operands)
    # Each gradient is read by two dots. Without the barrier XLA's CPU backend fuses it into both and computes it twice.
    return jax.lax.optimization_barrier(backward(d_hidden))


gated.defvjp(lambda gate, up: (_plain_gated(gate, up), (gate, up)), _gated_backward, definition=_plain_gated)

"""Root-mean-square normalisation (RMSNorm) and normalisation by mean and variance (LayerNorm)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.initializers import Constant
from anyexperts_jax.nn.config import Dtype
from anyexperts_jax.nn.params import named


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32 and returned as `dtype`."""

    eps: float = 1e-6
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        scale_D = self.param("scale", named(Constant(1.0), ("norm",)), x.shape[-1:], jnp.dtype(self.param_dtype))
        x = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        scale = jnp.broadcast_to(scale_D.astype(jnp.float32), x.shape)
        return (x * inverse_rms * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * scale + bias over the last axis, computed in float32 and returned as `dtype`."""

    eps: float = 1e-6
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        width, dtype = x.shape[-1:], jnp.dtype(self.param_dtype)
        scale_D = self.param("scale", named(Constant(1.0), ("norm",)), width, dtype)
        bias_D = self.param("bias", named(Constant(0.0), ("norm",)), width, dtype)
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scale, bias = (jnp.broadcast_to(own.astype(jnp.float32), x.shape) for own in (scale_D, bias_D))
        return (centred * inverse * scale + bias).astype(self.dtype)

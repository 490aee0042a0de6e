"""Softmax attention with grouped key/value heads."""

from anyexperts_jax.ops.attention.api import attention
from anyexperts_jax.ops.attention.mask import CausalMask

__all__ = ["CausalMask", "attention"]

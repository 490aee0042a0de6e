"""Softmax attention with grouped key/value heads."""

from anyexperts_jax.ops.attention.api import attention

__all__ = ["attention"]

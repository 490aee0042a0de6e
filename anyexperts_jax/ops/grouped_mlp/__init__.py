"""SwiGLU experts over one flat buffer of rows, grouped by expert."""

from anyexperts_jax.ops.grouped_mlp.api import grouped_mlp

__all__ = ["grouped_mlp"]

"""SwiGLU experts over routed tokens, dropless: dispatch, experts and combine in one op."""

from anyexperts_jax.ops.routed_mlp.api import routed_mlp

__all__ = ["routed_mlp"]

"""SwiGLU experts over buffers of C rows per expert."""

from anyexperts_jax.ops.expert_mlp.api import expert_mlp

__all__ = ["expert_mlp"]

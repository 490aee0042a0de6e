"""Thin Flax Linen shells: they declare parameters and call the pure functions below; losses are returned."""

from anyexperts_jax.nn.moe import MoE

__all__ = ["MoE"]

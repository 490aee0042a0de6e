"""Thin Flax Linen modules: they declare parameters, call the pure functions of the lower layers and return losses."""

from anyexperts_jax.nn.moe import MoE

__all__ = ["MoE"]

"""Who sees whom, said without an array of every pair."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from anyexperts_jax.core.tree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class CausalMask:
    """Position t attends to the valid positions up to t. What a position gets that is not valid itself is finite and
    else unspecified: implementations differ there."""

    valid_BT: Bool[Array, "B T"]

    def dense(self) -> Bool[Array, "B T T"]:
        """The mask as an array; a position that is not valid sees what a valid one would."""
        length = self.valid_BT.shape[1]
        return (jnp.arange(length) <= jnp.arange(length)[:, None]) & self.valid_BT[:, None, :]

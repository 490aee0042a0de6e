"""`CausalMask`: a causal attention mask in O(T) memory, without an array of all pairs."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from anyexperts_jax.core.tree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class CausalMask:
    """Position t attends to the valid positions up to t in its own segment. The result at an invalid position is finite
    but otherwise unspecified: implementations differ there."""

    valid_BT: Bool[Array, "B T"]
    segment_BT: Int[Array, "B T"] | None = None  # None: all positions of a sequence are one segment

    def dense(self) -> Bool[Array, "B T T"]:
        """The mask as an array. An invalid position attends to what a valid one in its segment would."""
        length = self.valid_BT.shape[1]
        place_T = jnp.arange(length, dtype=jnp.int32)
        return (place_T[None, None] <= place_T[None, :, None]) & self.without_causality()

    def without_causality(self) -> Bool[Array, "B T T"]:
        """The mask as an array, with later positions visible too."""
        batch, length = self.valid_BT.shape
        valid_BTT = jnp.broadcast_to(self.valid_BT[:, None, :], (batch, length, length))
        if self.segment_BT is None:
            return valid_BTT
        return valid_BTT & (self.segment_BT[:, :, None] == self.segment_BT[:, None, :])

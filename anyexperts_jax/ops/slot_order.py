"""`SlotOrder`: the slots of all tokens, expert after expert."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int


class SlotOrder(NamedTuple):
    """The slots n * K + k in expert order; slots without a real expert come last."""

    slots_R: Int[Array, "R"]  # slot at each place of the order, R = N * K
    places_NK: Int[Array, "N K"]  # the inverse: place of each slot
    starts_E: Int[Array, "E"]  # first place of each expert
    counts_E: Int[Array, "E"]  # real slots of each expert

    @property
    def held_NK(self) -> Bool[Array, "N K"]:
        """True at the slots that hold a real expert: they come first in the order."""
        return self.places_NK < self.counts_E.sum(dtype=self.places_NK.dtype)

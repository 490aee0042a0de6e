"""`SlotOrder`: the slots of all tokens, sorted by expert."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int


class SlotOrder(NamedTuple):
    """The slots n * K + k sorted by expert; slots without a real expert come last.

    If few slots are known to be real, `slots_R` may end early, as long as it has all real slots: the time and memory of
    the expert ops depend on its length. Empty slots may then have places beyond its end.
    """

    slots_R: Int[Array, "R"]  # the slot at each place of the order, R <= N * K
    places_NK: Int[Array, "N K"]  # the inverse: the place of each slot
    starts_E: Int[Array, "E"]  # first place of each expert
    counts_E: Int[Array, "E"]  # real slots of each expert

    @property
    def held_NK(self) -> Bool[Array, "N K"]:
        """True for slots with a real expert. These come first in the order, so their places are below the total."""
        return self.places_NK < self.counts_E.sum(dtype=self.places_NK.dtype)

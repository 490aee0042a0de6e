"""What the towers of a published model read, and where in a batch of sequences their rows go."""

import dataclasses

from jaxtyping import Float, Int

from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.models.audio_tower import Sounds
from anyexperts_jax.models.vision_tower import Frames


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PlacedMedia:
    """Frames and sounds, and the places of the rows that the towers make of them."""

    frames: Frames | None
    sounds: Sounds | None
    row_BT: Int[ArrayLike, "B T"]  # the row of its tower that the position reads, all counted on; -1: none
    modality_BT: Int[ArrayLike, "B T"]  # core.modality.Modality, which says the tower
    rotary_BT3: Float[ArrayLike, "B T 3"]  # time, row and column by which the position is rotated

"""The batch: what the data pipeline yields and the model reads."""

import dataclasses

from jaxtyping import Array, Bool, Float, Int
from numpy import ndarray

from anyexperts_jax.core.tree import register_dataclass

ArrayLike = Array | ndarray


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of multimodal sequences, right-padded to T positions.

    A sequence is `BOS media question SEP answer EOS`. Media positions hold no token id (`tokens_BT` is PAD there);
    the j-th image or video position of a sequence reads row j of `patches_BPX`, the j-th audio position row j of
    `frames_BSX`. P, S and X are fixed by the encoding spec, so every batch of a run has the same shapes.
    """

    tokens_BT: Int[ArrayLike, "B T"]
    modality_BT: Int[ArrayLike, "B T"]  # core.modality.Modality
    valid_BT: Bool[ArrayLike, "B T"]  # False at padding
    loss_mask_BT: Bool[ArrayLike, "B T"]  # True where position t predicts tokens[t + 1], a token of the answer or EOS
    evidence_BT: Bool[ArrayLike, "B T"]  # True at media or question tokens that carry the answer (ground truth)
    time_BT: Int[ArrayLike, "B T"]  # frame index of a video position, chunk index of an audio position, else 0
    patches_BPX: Float[ArrayLike, "B P XP"]  # float32 pixels in [-1, 1], rows past the sequence's own are zero
    patch_place_BP: Int[ArrayLike, "B P"]  # place of the patch on its frame's grid, row-major
    frames_BSX: Float[ArrayLike, "B S XA"]  # float32 stacked log-mel frames, rows past the sequence's own are zero
    domain_B: Int[ArrayLike, "B"]  # index into the domain names of the mixture
    question_B: Int[ArrayLike, "B"]  # index into the domain's question types
    level_B: Int[ArrayLike, "B"]  # difficulty, 1 to 3
    example_B: Int[ArrayLike, "B"]  # index of the example in its domain and split

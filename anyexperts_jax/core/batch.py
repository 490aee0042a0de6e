"""The batch: what the data pipeline yields and the model reads."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy import ndarray

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.tree import register_dataclass

ArrayLike = Array | ndarray


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of multimodal rows, right-padded to T positions, each of one example or of several packed ones.

    An example is `BOS media question SEP answer EOS`. Media positions hold no token id (`tokens_BT` is PAD there);
    the j-th image or video position of a row reads row j of `patches_BPX`, the j-th audio position row j of
    `frames_BSX`. P, S and X are fixed by the encoding spec, so every batch of a run has the same shapes.

    A *segment* is one packed example: its positions attend to one another and to no other segment. Segments are
    numbered from 0 in row order. Padding carries the last segment's number, so only `valid_BT` marks padding.
    An *item* is one picture, video or sound: in the encoder its patches or frames attend to one another and to no other
    item. The items of a row are numbered from 0, over all kinds and segments.
    """

    tokens_BT: Int[ArrayLike, "B T"]
    modality_BT: Int[ArrayLike, "B T"]  # core.modality.Modality
    valid_BT: Bool[ArrayLike, "B T"]  # False at padding
    loss_mask_BT: Bool[ArrayLike, "B T"]  # True where position t predicts tokens[t + 1], a token of the answer or EOS
    evidence_BT: Bool[ArrayLike, "B T"]  # True at media or question tokens that carry the answer (ground truth)
    time_BT: Int[ArrayLike, "B T"]  # frame index of a video position, chunk index of an audio position, else 0
    segment_BT: Int[ArrayLike, "B T"]  # segment of the position
    position_BT: Int[ArrayLike, "B T"]  # place of the position in its segment, from 0
    patches_BPX: Float[ArrayLike, "B P XP"]  # float32 pixels in [-1, 1], rows past the sequence's own are zero
    patch_row_BP: Int[ArrayLike, "B P"]  # row of the patch on its frame's grid
    patch_column_BP: Int[ArrayLike, "B P"]  # column of the patch on its frame's grid
    patch_item_BP: Int[ArrayLike, "B P"]  # item of the patch
    frames_BSX: Float[ArrayLike, "B S XA"]  # float32 stacked log-mel frames, rows past the sequence's own are zero
    frame_item_BS: Int[ArrayLike, "B S"]  # item of the frame
    domain_B: Int[ArrayLike, "B"]  # index into the mixture's domain names; this and the fields below describe segment 0
    question_B: Int[ArrayLike, "B"]  # index into the domain's question types
    level_B: Int[ArrayLike, "B"]  # difficulty, 1 to 3
    example_B: Int[ArrayLike, "B"]  # index of the example in its domain and split


def make_batch(tokens_BT: Int[ArrayLike, "B T"], **fields: Any) -> Batch:
    """Makes a batch of `tokens_BT` and any other fields of `Batch`, given by name.

    The fields left out describe one text example per row: every position is valid, none is in the loss, and there are
    no patches or frames. Patches or frames given without coordinates belong to item 0, at row 0 and column 0.
    """
    B, T = tokens_BT.shape
    patches_BPX = fields.get("patches_BPX", np.zeros((B, 0, 0), np.float32))
    frames_BSX = fields.get("frames_BSX", np.zeros((B, 0, 0), np.float32))
    zeros_BT, zeros_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
    zeros_BP = np.zeros(patches_BPX.shape[:2], np.int32)
    plain = {
        "modality_BT": zeros_BT,
        "valid_BT": np.ones((B, T), bool),
        "loss_mask_BT": np.zeros((B, T), bool),
        "evidence_BT": np.zeros((B, T), bool),
        "time_BT": zeros_BT,
        "segment_BT": zeros_BT,
        "position_BT": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "patches_BPX": patches_BPX,
        "patch_row_BP": zeros_BP,
        "patch_column_BP": zeros_BP,
        "patch_item_BP": zeros_BP,
        "frames_BSX": frames_BSX,
        "frame_item_BS": np.zeros(frames_BSX.shape[:2], np.int32),
        "domain_B": zeros_B,
        "question_B": zeros_B,
        "level_B": zeros_B,
        "example_B": zeros_B,
    }
    return Batch(tokens_BT=tokens_BT, **{**plain, **fields})


def require_one_segment(batch: Batch, why: str) -> None:
    """Checks that every row holds one example. Inside `jit`, where values are not known, nothing is checked.

    Raises:
      UserError: for packed rows; the message gives the number of segments and `why`.
    """
    if isinstance(batch.segment_BT, jax.core.Tracer):
        return
    most = int(np.asarray(batch.segment_BT).max(initial=0)) + 1
    require(most == 1, f"a row of the batch has {most} packed examples, but {why}")

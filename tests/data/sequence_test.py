import dataclasses

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.sequence import MediaPart, TokenPart, assemble, concatenate, padded
from anyexperts_jax.tokenizers.bytes import PAD

SPEC = EncodingSpec(max_length=24, patch_size=1, max_patches=8, mel_bands=2, frames_per_chunk=1, max_frames=5)
TEXT, IMAGE, AUDIO, VIDEO = Modality


def picture(rows, columns, first=0.0):
    place = np.unravel_index(np.arange(rows * columns), (rows, columns))
    features = first + np.arange(rows * columns * 3, dtype=np.float32).reshape(-1, 3)
    return MediaPart(IMAGE, features, np.arange(rows * columns) == 1, np.zeros(rows * columns, int), *place)


def sound(chunks):
    features, nowhere = np.ones((chunks, 2), np.float32), np.zeros(chunks, int)
    return MediaPart(AUDIO, features, np.zeros(chunks, bool), np.arange(chunks), nowhere, nowhere)


def conversation():
    """Returns a sequence of two pictures of different grids with a sound between them, and text around all three."""
    return assemble(
        [
            TokenPart([7]),
            picture(2, 1),
            TokenPart([1, 2], evidence=np.array([False, True])),
            sound(3),
            picture(1, 2, first=50.0),
            TokenPart([3]),
            TokenPart([4, 5], in_loss=True),
        ],
        SPEC,
    )


def test_media_are_placed_in_order_with_an_item_and_coordinates_each():
    made = conversation()
    assert made.tokens_T.tolist() == [7, *[PAD] * 2, 1, 2, *[PAD] * 5, 3, 4, 5]
    assert made.modality_T.tolist() == [TEXT, IMAGE, IMAGE, TEXT, TEXT, AUDIO, AUDIO, AUDIO, IMAGE, IMAGE, *[TEXT] * 3]
    assert np.flatnonzero(made.loss_mask_T).tolist() == [10, 11]  # predict 4 and 5
    assert np.flatnonzero(made.evidence_T).tolist() == [2, 4, 9]
    assert made.time_T.tolist() == [0] * 5 + [0, 1, 2] + [0] * 5
    assert made.patches_PX[:, 0].tolist() == [0, 3, 50, 53]  # in the order of positions
    assert made.patch_item_P.tolist() == [0, 0, 2, 2]
    assert made.patch_row_P.tolist() == [0, 1, 0, 0]
    assert made.patch_column_P.tolist() == [0, 0, 0, 1]
    assert made.frame_item_S.tolist() == [1, 1, 1]
    assert made.position_T.tolist() == list(range(13))


def test_padding_continues_the_last_segment_and_is_not_valid():
    fields = padded(concatenate([conversation(), assemble([TokenPart([9, 8])], SPEC)]), SPEC)
    assert np.flatnonzero(fields["valid_BT"]).tolist() == list(range(15))
    assert fields["segment_BT"].tolist() == [0] * 13 + [1] * 11
    assert fields["position_BT"].tolist() == [*range(13), *range(11)]
    assert fields["tokens_BT"].tolist()[13:] == [9, 8, *[PAD] * 9]
    assert not fields["loss_mask_BT"][13:].any()
    assert fields["patches_BPX"].shape == (8, 3)
    assert not fields["frames_BSX"][3:].any()


def test_joined_sequences_renumber_segments_and_keep_coordinates_and_times():
    one = dataclasses.replace(conversation(), domain=3, example=11)
    row = concatenate([one, assemble([TokenPart([1])], SPEC), concatenate([one, sound_alone()])])
    T = 13
    assert row.segment_T.tolist() == [0] * T + [1] + [2] * T + [3] * 2
    assert row.position_T.tolist() == [*range(T), 0, *range(T), 0, 1]
    assert row.patch_item_P.tolist() == [0, 0, 2, 2, 3, 3, 5, 5]
    assert row.frame_item_S.tolist() == [1, 1, 1, 4, 4, 4, 6]
    for name in ("tokens_T", "modality_T", "loss_mask_T", "evidence_T", "time_T"):
        np.testing.assert_array_equal(getattr(row, name)[T + 1 : 2 * T + 1], getattr(one, name), err_msg=name)
    for name in ("patches_PX", "patch_row_P", "patch_column_P"):
        np.testing.assert_array_equal(getattr(row, name)[4:], getattr(one, name), err_msg=name)
    assert (row.domain, row.example) == (3, 11)
    assert row.size == dataclasses.replace(row.size, positions=2 * T + 3, patches=8, frames=7)


def sound_alone():
    return assemble([TokenPart([2]), sound(1)], SPEC)


def test_a_sequence_that_does_not_fit_a_row_is_refused_with_its_sizes():
    with pytest.raises(
        UserError,
        match=r"26 positions, 8 patches and 6 audio frames does not fit in a row of 24, 8 and 5: encoding.max_length",
    ):
        padded(concatenate([conversation()] * 2), SPEC)
    with pytest.raises(UserError, match="the first part of a sequence is in the loss"):
        assemble([TokenPart([1], in_loss=True)], SPEC)

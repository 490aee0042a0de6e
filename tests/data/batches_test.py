import dataclasses

import chex
import numpy as np
import pytest

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import batches
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.encode import encode
from anyexperts_jax.tokenizers.bytes import PAD, SEP
from data.examples import audio_example, image_example, text_example, video_example

SPEC = EncodingSpec(max_length=32, max_patches=8, max_frames=16)
FIELDS = [field.name for field in dataclasses.fields(Batch)]


@pytest.fixture
def batch():
    examples = [text_example(), image_example(), video_example(), audio_example()]
    return batches.stack([encode(e, SPEC, example_index=i) for i, e in enumerate(examples)])


def test_stack_keeps_the_order_and_adds_a_dimension(batch):
    assert batch.tokens_BT.shape == (4, 32)
    assert batch.example_B.tolist() == [0, 1, 2, 3]


def test_padding_rows_are_invalid(batch):
    padded = batches.pad_rows(batch, 6)
    for name in FIELDS:
        values, original = getattr(padded, name), getattr(batch, name)
        assert values.shape == (6, *original.shape[1:])
        assert values.dtype == original.dtype
        assert (values[:4] == original).all()
        assert (values[4:] == (PAD if name == "tokens_BT" else 0)).all()
    with pytest.raises(UserError, match="a batch of 4 rows does not fit in 3"):
        batches.pad_rows(batch, 3)


def test_an_empty_batch_has_the_shapes_of_any_other(batch):
    empty = batches.empty_batch(SPEC, 4)
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, empty)
    padding = batches.pad_rows(batch, 8)
    assert all((getattr(padding, name)[4:] == getattr(empty, name)).all() for name in FIELDS)


def test_questions_and_answers_can_be_read_back(batch):
    padded = batches.pad_rows(batch, 5)
    assert batches.answers(padded) == ["yes", "12", "end", "one", ""]
    assert batches.questions(padded) == ["is 3 odd?", "q?", "when?", "said?", ""]


def test_prompts_end_with_sep_and_keep_everything_before(batch):
    padded = batches.pad_rows(batch, 5)
    prompts = batches.prompts(padded)
    for row, length in enumerate(prompts.valid_BT.sum(axis=1)[:4]):
        assert prompts.tokens_BT[row, length - 1] == SEP
        assert (prompts.tokens_BT[row, length:] == PAD).all()
        assert (prompts.tokens_BT[row, :length] == batch.tokens_BT[row, :length]).all()
        assert prompts.valid_BT[row, :length].all()
    assert not prompts.valid_BT[4].any()
    assert not prompts.loss_mask_BT.any()
    assert prompts.tokens_BT.dtype == np.int32
    assert prompts.patches_BPX is padded.patches_BPX

import dataclasses

import numpy as np
import pytest

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.encode import encode, require_fits_model
from anyexperts_jax.data.features import log_mel, stack_frames
from anyexperts_jax.models.config import AudioConfig, ModelConfig, VisionConfig
from anyexperts_jax.nn.config import AttentionConfig, StackConfig
from anyexperts_jax.tokenizers.bytes import BOS, EOS, PAD, SEP
from data.examples import audio_example, image_example, text_example, video_example

SPEC = EncodingSpec(max_length=32, max_patches=8, max_frames=16)
TEXT, IMAGE, AUDIO, VIDEO = Modality


def test_the_fields_are_the_batchs():
    names = [field.name for field in dataclasses.fields(Batch)]
    for example in (text_example(), image_example(), video_example(), audio_example()):
        fields = encode(example, SPEC)
        assert sorted(fields) == sorted(names)
        assert fields["tokens_BT"].shape == (32,)
        assert fields["patches_BPX"].shape == (8, 192)
        assert fields["frames_BSX"].shape == (16, 160)
        assert {v.dtype.name for v in fields.values()} == {"int32", "bool", "float32"}


def test_a_text_sequence_by_hand():
    fields = encode(text_example(), SPEC, domain_index=2, question_index=1, example_index=9)
    text = [*b"is 3 odd?", SEP, *b"yes", EOS]
    assert fields["tokens_BT"].tolist() == [BOS, *text] + [PAD] * 17
    assert np.flatnonzero(fields["valid_BT"]).tolist() == list(range(15))
    assert np.flatnonzero(fields["loss_mask_BT"]).tolist() == [10, 11, 12, 13]  # predict y, e, s and EOS
    assert np.flatnonzero(fields["evidence_BT"]).tolist() == [4, 6, 7, 8]  # "3" and "odd"
    assert not fields["modality_BT"].any()
    assert not fields["patches_BPX"].any()
    assert not fields["segment_BT"].any()
    assert fields["position_BT"].tolist() == list(range(32))
    assert [int(fields[name]) for name in ("domain_B", "question_B", "level_B", "example_B")] == [2, 1, 2, 9]


def test_evidence_follows_bytes():
    fields = encode(text_example(question="é=3?", question_evidence=((2, 3),)), SPEC)
    assert np.flatnonzero(fields["evidence_BT"]).tolist() == [4]  # BOS, two bytes, "=", "3"


def test_an_image_by_hand():
    fields = encode(image_example(), SPEC)  # two rows of three patches
    media = slice(1, 7)
    assert fields["tokens_BT"].tolist()[:10] == [BOS, *[PAD] * 6, *b"q?", SEP]
    assert (fields["modality_BT"][media] == IMAGE).all()
    assert (fields["modality_BT"] == IMAGE).sum() == 6
    assert np.flatnonzero(fields["evidence_BT"]).tolist() == [2, 5]
    assert fields["patch_row_BP"].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert fields["patch_column_BP"].tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert not fields["patch_item_BP"].any()
    pixels = (fields["patches_BPX"][:6].reshape(6, 8, 8, 3) + 1) * 127.5
    assert np.allclose(pixels[4, 2, 3], [8 + 2, 8 + 3, 7], atol=1e-4)  # row 1, column 1 of the grid
    assert (fields["patches_BPX"][6:] == 0).all()
    assert not fields["time_BT"].any()


def test_a_patch_is_evidence_from_an_eighth_of_its_pixels():
    fields = encode(video_example(), SPEC)  # 7 and 8 of 64 pixels
    assert np.flatnonzero(fields["evidence_BT"]).tolist() == [6]
    lower = dataclasses.replace(SPEC, patch_evidence=7 / 64)
    assert np.flatnonzero(encode(video_example(), lower)["evidence_BT"]).tolist() == [5, 6]


def test_a_video_by_hand():
    fields = encode(video_example(), SPEC)
    assert (fields["modality_BT"][1:7] == VIDEO).all()
    assert fields["time_BT"][:8].tolist() == [0, 0, 0, 1, 1, 2, 2, 0]
    assert not fields["patch_row_BP"].any()
    assert fields["patch_column_BP"].tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    assert np.allclose((fields["patches_BPX"][:6, 0] + 1) * 127.5, [0, 0, 1, 1, 2, 2], atol=1e-4)


def test_audio_by_hand():
    example = audio_example()  # 48 frames of 10 ms make 12 chunks
    fields = encode(example, SPEC)
    assert (fields["modality_BT"] == AUDIO).sum() == 12
    assert (fields["frames_BSX"][:12] == stack_frames(log_mel(example.audio, 40), 4)).all()
    assert not fields["frames_BSX"][12:].any()
    assert fields["time_BT"][1:13].tolist() == list(range(12))
    # A chunk is 40 ms; its first frame's centre is 12.5 ms after its begin. 0.2 to 0.3 s: chunks 5 to 7, and 4's last.
    assert np.flatnonzero(fields["evidence_BT"][1:13]).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("example", "change", "message"),
    [
        (
            text_example(question="x" * 40, question_evidence=()),
            {},
            r"general/which example needs 46 positions \(media 0, question 40, answer 3, BOS, SEP and EOS\), "
            "more than encoding.max_length=32; raise data.encoding.max_length$",
        ),
        (
            image_example(),
            {"max_length": 12},
            "needs 13 positions .*; raise data.encoding.max_length, or lower data.encoding.max_patches or max_frames$",
        ),
        (
            image_example(),
            {"max_patches": 5, "pictures": "whole"},
            "image of 24 x 16 pixels makes 6 patches, more than encoding.max_patches=5",
        ),
        (
            video_example(),
            {"max_video_frames": 2, "pictures": "whole"},
            "has 3 frames, more than encoding.max_video_frames=2",
        ),
        (
            image_example(),
            {"patch_size": 5, "pictures": "whole"},
            "does not divide into patches of encoding.patch_size=5",
        ),
        (
            audio_example(),
            {"max_frames": 11},
            "audio of 8000 samples makes 12 chunks, more than encoding.max_frames=11",
        ),
    ],
)
def test_an_example_that_is_too_long_is_refused_with_its_lengths(example, change, message):
    with pytest.raises(UserError, match=message):
        encode(example, dataclasses.replace(SPEC, **change))


def test_an_example_that_just_fits_is_encoded():
    spec = dataclasses.replace(SPEC, max_length=13, max_patches=6)
    assert encode(image_example(), spec)["valid_BT"].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 0}, "encoding.max_length=0 must be >= 1"),
        ({"max_video_frames": 0}, "encoding.max_video_frames=0 must be >= 1"),
        ({"max_frames": -1}, "encoding.max_frames=-1 must be >= 0"),
        ({"patch_evidence": 0.0}, r"encoding.patch_evidence=0.0 must be in \(0, 1\]"),
    ],
)
def test_a_spec_refuses_bad_values(change, message):
    with pytest.raises(UserError, match=message):
        EncodingSpec(**change)


def test_an_encoding_that_the_model_cannot_read_is_refused():
    in_space = StackConfig(attention=AttentionConfig(mrope_section=(8, 4, 4)))
    require_fits_model(EncodingSpec(), ModelConfig())
    require_fits_model(EncodingSpec(max_frames=0), ModelConfig(audio=None))
    require_fits_model(
        EncodingSpec(max_patches=10_000), ModelConfig()
    )  # positions are coordinates, not rows of a table
    for spec, model, message in (
        (EncodingSpec(max_length=256), ModelConfig(), "max_length=256 is longer than the model's max_length=128"),
        (
            EncodingSpec(),
            ModelConfig(vocab_size=256, pad_id=1, eos_id=2),
            "vocab_size=256 is below the tokenizer's 260",
        ),
        (EncodingSpec(), ModelConfig(pad_id=0), "model.pad_id=0 is not of tokenizer 'bytes'; set model.pad_id=256"),
        (
            EncodingSpec(),
            ModelConfig(eos_id=256),
            "model.eos_id=256 is not of tokenizer 'bytes'; set model.pad_id=256, model.eos_id=259",
        ),
        (EncodingSpec(), ModelConfig(audio=None), "the model has no audio part; set encoding.max_frames=0"),
        (EncodingSpec(), ModelConfig(audio=AudioConfig(frame_features=128)), "makes 160 audio features"),
        (EncodingSpec(patch_size=4), ModelConfig(vision=VisionConfig()), "makes 48 vision features"),
        (EncodingSpec(max_video_frames=17), ModelConfig(), "max_video_frames=17 is more than .* vision.max_frames=16"),
        (EncodingSpec(), ModelConfig(stack=in_space), "model.vision_tower .* are parts of published models"),
    ):
        with pytest.raises(UserError, match=message):
            require_fits_model(spec, model)

"""From an example to one sequence of the model: tokens, patches, audio frames, masks and evidence."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.features import chunks_in_spans, log_mel, stack_frames
from anyexperts_jax.data.tokenizer import BOS, EOS, PAD, SEP, VOCAB_SIZE, byte_spans, require_special_ids
from anyexperts_jax.data.tokenizer import encode as encode_text
from anyexperts_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class _Media:
    """An example's media positions: their features, where and when they are, and which carry the answer."""

    modality: Modality
    features: Float32[ndarray, "media X"]
    evidence: Bool[ndarray, " media"]
    time: ndarray
    place: ndarray


def encode(
    example: Example, spec: EncodingSpec, *, domain_index: int = 0, question_index: int = 0, example_index: int = 0
) -> dict[str, np.ndarray]:
    """One sequence: the fields of `core.batch.Batch` by name, each without its batch dimension.

    The indices fill domain_B, question_B and example_B.

    Raises:
      UserError: when the example does not fit `spec`.
    """
    media = _media(example, spec)
    question, answer = encode_text(example.question), encode_text(example.answer)
    count = 0 if media is None else len(media.features)
    _require_room(example, spec, count, len(question), len(answer))
    begin = 1 + count  # of the question
    sep = begin + len(question)
    end = sep + len(answer) + 2

    tokens = np.full(spec.max_length, PAD, np.int32)
    tokens[0], tokens[begin:sep], tokens[sep] = BOS, question, SEP
    tokens[sep + 1 : end - 1], tokens[end - 1] = answer, EOS
    loss_mask = np.zeros(spec.max_length, bool)
    loss_mask[sep : end - 1] = True
    evidence = np.zeros(spec.max_length, bool)
    for start, stop in byte_spans(example.question, example.question_evidence):
        evidence[begin + start : begin + stop] = True
    fields = {
        "tokens_BT": tokens,
        "modality_BT": np.full(spec.max_length, Modality.TEXT, np.int32),
        "valid_BT": np.arange(spec.max_length) < end,
        "loss_mask_BT": loss_mask,
        "evidence_BT": evidence,
        "time_BT": np.zeros(spec.max_length, np.int32),
        "patches_BPX": np.zeros((spec.max_patches, spec.patch_features), np.float32),
        "patch_place_BP": np.zeros(spec.max_patches, np.int32),
        "frames_BSX": np.zeros((spec.max_frames, spec.frame_features), np.float32),
        "domain_B": np.asarray(domain_index, np.int32),
        "question_B": np.asarray(question_index, np.int32),
        "level_B": np.asarray(example.level, np.int32),
        "example_B": np.asarray(example_index, np.int32),
    }
    if media is not None:
        _place_media(fields, media)
    return fields


def patches(pixels: UInt8[ndarray, "F H W 3"], patch_size: int) -> Float32[ndarray, "P X"]:
    """Square patches, frame by frame and row by row; each its pixels row by row, in [-1, 1]."""
    frames, height, width, _ = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixels.reshape(frames, rows, patch_size, columns, patch_size, 3).swapaxes(2, 3)
    return grid.reshape(frames * rows * columns, -1).astype(np.float32) / np.float32(127.5) - np.float32(1)


def _place_media(fields: dict[str, np.ndarray], media: _Media) -> None:
    """Writes media into the positions after BOS and into the rows of its features."""
    count = len(media.features)
    positions = slice(1, 1 + count)
    fields["modality_BT"][positions] = media.modality
    fields["evidence_BT"][positions] = media.evidence
    fields["time_BT"][positions] = media.time
    if media.modality == Modality.AUDIO:
        fields["frames_BSX"][:count] = media.features
    else:
        fields["patches_BPX"][:count] = media.features
        fields["patch_place_BP"][:count] = media.place


def _media(example: Example, spec: EncodingSpec) -> _Media | None:
    if example.image is not None:
        evidence = None if example.image_evidence is None else example.image_evidence[None]
        return _visual(example, spec, Modality.IMAGE, example.image[None], evidence)
    if example.video is not None:
        return _visual(example, spec, Modality.VIDEO, example.video, example.video_evidence)
    if example.audio is not None:
        return _audio(example, spec, example.audio)
    return None


def _visual(
    example: Example, spec: EncodingSpec, modality: Modality, pixels: np.ndarray, evidence: np.ndarray | None
) -> _Media:
    frames, height, width, _ = pixels.shape
    size = spec.patch_size
    where = f"{example.domain} {example.media} of {width} x {height} pixels"
    require(
        height % size == 0 and width % size == 0, f"{where} does not divide into patches of encoding.patch_size={size}"
    )
    rows, columns = height // size, width // size
    count = frames * rows * columns
    require(
        count <= spec.max_patches, f"{where} makes {count} patches, more than encoding.max_patches={spec.max_patches}"
    )
    require(
        frames <= spec.max_video_frames,
        f"{where} has {frames} frames, more than encoding.max_video_frames={spec.max_video_frames}",
    )
    share = np.zeros(count)
    if evidence is not None:
        share = evidence.reshape(frames, rows, size, columns, size).mean(axis=(2, 4)).reshape(count)
    time, place = np.divmod(np.arange(count), rows * columns)
    return _Media(modality, patches(pixels, size), share >= spec.patch_evidence, time, place)


def _audio(example: Example, spec: EncodingSpec, audio: np.ndarray) -> _Media:
    features = stack_frames(log_mel(audio, spec.mel_bands), spec.frames_per_chunk)
    count = len(features)
    where = f"{example.domain} audio of {len(audio)} samples"
    require(count <= spec.max_frames, f"{where} makes {count} chunks, more than encoding.max_frames={spec.max_frames}")
    evidence = chunks_in_spans(example.audio_evidence, count, spec.frames_per_chunk)
    return _Media(Modality.AUDIO, features, evidence, np.arange(count), np.zeros(count, np.int64))


def _require_room(example: Example, spec: EncodingSpec, media: int, question: int, answer: int) -> None:
    needed = media + question + answer + 3
    require(
        needed <= spec.max_length,
        f"a {example.domain}/{example.question_type} example needs {needed} positions (media {media}, question "
        f"{question}, answer {answer}, BOS, SEP and EOS), more than encoding.max_length={spec.max_length}",
    )


def require_fits_model(spec: EncodingSpec, model: ModelConfig) -> None:
    """Checks that a model made by `model` reads sequences made by `spec`.

    Raises:
      UserError: naming both values where they do not fit.
    """
    length = f"encoding.max_length={spec.max_length}"
    require(spec.max_length <= model.max_length, f"{length} is longer than the model's max_length={model.max_length}")
    require(
        model.vocab_size >= VOCAB_SIZE,
        f"the model's vocab_size={model.vocab_size} is below the tokenizer's {VOCAB_SIZE}",
    )
    require_special_ids(model.pad_id, model.eos_id)
    parts = (
        ("vision", "max_patches", "patch_features", spec.patch_features),
        ("audio", "max_frames", "frame_features", spec.frame_features),
    )
    for part, rows, name, features in parts:
        if getattr(spec, rows) == 0:
            continue
        config = getattr(model, part)
        require(config is not None, f"the model has no {part} part; set encoding.{rows}=0 or give it one")
        reads = getattr(config, name)
        require(reads == features, f"encoding makes {features} {part} features, the model's {part}.{name} is {reads}")
    if spec.max_patches and model.vision is not None:
        for name, table in (("max_patches", "max_places"), ("max_video_frames", "max_frames")):
            value, limit = getattr(spec, name), getattr(model.vision, table)
            require(value <= limit, f"encoding.{name}={value} is more than the model's vision.{table}={limit}")

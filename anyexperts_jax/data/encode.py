"""Encodes an example as one sequence of the model: tokens, patches, audio frames, masks and evidence."""

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.features import chunks_in_spans, log_mel, stack_frames
from anyexperts_jax.data.prepare import prepare
from anyexperts_jax.data.sequence import EncodedSequence, MediaPart, Part, TokenPart, assemble, padded
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.tokenizers.base import Tokenizer, require_fits_vocabulary
from anyexperts_jax.tokenizers.bytes import BYTES
from anyexperts_jax.tokenizers.bytes import NAME as BYTES_NAME


def encode_example(
    example: Example,
    spec: EncodingSpec,
    *,
    tokenizer: Tokenizer = BYTES,
    domain_index: int = 0,
    question_index: int = 0,
    example_index: int = 0,
) -> EncodedSequence:
    """Encodes an example as one sequence: BOS, media, question, SEP, answer, EOS, with the tokenizer's ids.

    The indices fill domain_B, question_B and example_B.

    Raises:
      UserError: if the example does not fit `spec`.
    """
    example = prepare(example, spec)
    media = _media(example, spec)
    special, question, answer = tokenizer.special, tokenizer.encode(example.question), tokenizer.encode(example.answer)
    _require_room(example, spec, sum(len(part.features) for part in media), len(question), len(answer))
    evidence = question.overlapping(example.question_evidence)
    parts: list[Part] = [TokenPart([special.begin]), *media, TokenPart(question.ids_T, evidence=evidence)]
    parts += [TokenPart([special.separator]), TokenPart([*answer.ids_T.tolist(), special.eos[0]], in_loss=True)]
    indices = {"domain": domain_index, "question": question_index, "level": example.level, "example": example_index}
    return assemble(parts, spec, pad=special.pad, **indices)


def encode(
    example: Example, spec: EncodingSpec, *, tokenizer: Tokenizer = BYTES, **indices: int
) -> dict[str, np.ndarray]:
    """Encodes an example as a padded row: the fields of `core.batch.Batch` by name, without the batch dimension.

    Args:
      indices: see `encode_example`.

    Raises:
      UserError: if the example does not fit `spec`.
    """
    return padded(encode_example(example, spec, tokenizer=tokenizer, **indices), spec)


def patches(pixels: UInt8[ndarray, "F H W 3"], patch_size: int) -> Float32[ndarray, "P X"]:
    """Cuts frames into square patches, frame by frame and row by row, with pixels row by row in [-1, 1]."""
    frames, height, width, _ = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixels.reshape((frames, rows, patch_size, columns, patch_size, 3)).swapaxes(2, 3)
    return grid.reshape(frames * rows * columns, -1).astype(np.float32) / np.float32(127.5) - np.float32(1)


def media_parts(example: Example, spec: EncodingSpec) -> list[MediaPart]:
    """Encodes the example's medium as patches or frames; [] for a question in text only.

    Raises:
      UserError: if it does not fit `spec`.
    """
    return _media(prepare(example, spec), spec)


def _media(example: Example, spec: EncodingSpec) -> list[MediaPart]:
    if example.image is not None:
        evidence = None if example.image_evidence is None else example.image_evidence[None]
        return [_visual(spec, Modality.IMAGE, example.image[None], evidence)]
    if example.video is not None:
        return [_visual(spec, Modality.VIDEO, example.video, example.video_evidence)]
    if example.audio is not None:
        return [_audio(example, spec, example.audio)]
    return []


def _visual(
    spec: EncodingSpec, modality: Modality, pixels_FHW3: np.ndarray, evidence_FHW: np.ndarray | None
) -> MediaPart:
    """Encodes a picture, as a video of one frame, or a video; `data.prepare` has made it whole patches."""
    frames, height, width, _ = pixels_FHW3.shape
    size = spec.patch_size
    rows, columns = height // size, width // size
    count = frames * rows * columns
    share = np.zeros(count)
    if evidence_FHW is not None:
        share = evidence_FHW.reshape(frames, rows, size, columns, size).mean(axis=(2, 4)).reshape(count)
    time, row, column = np.unravel_index(np.arange(count), (frames, rows, columns))
    return MediaPart(
        modality,
        patches(pixels_FHW3, size),
        share >= spec.patch_evidence,
        time=time,
        grid_row=row,
        grid_column=column,
    )


def _audio(example: Example, spec: EncodingSpec, audio: np.ndarray) -> MediaPart:
    features = stack_frames(log_mel(audio, spec.mel_bands), spec.frames_per_chunk)
    count = len(features)
    where = f"{example.domain} audio of {len(audio)} samples"
    require(count <= spec.max_frames, f"{where} makes {count} chunks, more than encoding.max_frames={spec.max_frames}")
    evidence = chunks_in_spans(example.audio_evidence, count, spec.frames_per_chunk)
    nowhere = np.zeros(count, np.int64)
    return MediaPart(Modality.AUDIO, features, evidence, time=np.arange(count), grid_row=nowhere, grid_column=nowhere)


def _require_room(example: Example, spec: EncodingSpec, media: int, question: int, answer: int) -> None:
    needed = media + question + answer + 3
    if needed <= spec.max_length:
        return
    fewer = ", or lower data.encoding.max_patches or max_frames" if media else ""
    raise UserError(
        f"a {example.domain}/{example.question_type} example needs {needed} positions (media {media}, question "
        f"{question}, answer {answer}, BOS, SEP and EOS), more than encoding.max_length={spec.max_length}; "
        f"raise data.encoding.max_length{fewer}"
    )


def require_model_ids(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Checks that a model's special ids are those of the tokenizer; with others generation would never stop.

    Raises:
      UserError: naming the values and what to set.
    """
    require_fits_vocabulary(tokenizer, model.vocab_size)
    special = tokenizer.special
    wanted = {"pad_id": special.pad, "eos_id": special.eos[0]}
    wrong = [f"model.{name}={getattr(model, name)}" for name, id in wanted.items() if getattr(model, name) != id]
    right = comma_list(f"model.{name}={id}" for name, id in wanted.items())
    require(not wrong, f"{comma_list(wrong)} is not of tokenizer {tokenizer.name!r}; set {right}")


def require_fits_model(spec: EncodingSpec, model: ModelConfig, tokenizer: str = BYTES_NAME) -> None:
    """Checks that a model with the configuration `model` can read the sequences of `spec`.

    Args:
      tokenizer: the value of `data.tokenizer`; only bytes can be checked without reading a file.

    Raises:
      UserError: naming both values, if they do not fit.
    """
    length = f"encoding.max_length={spec.max_length}"
    require(
        spec.max_length <= model.max_length,
        f"{length} is longer than the model's max_length={model.max_length}; raise model.max_length too, or lower it",
    )
    require(
        tokenizer != BYTES_NAME or model.vocab_size >= BYTES.vocab_size,
        f"the model's vocab_size={model.vocab_size} is below the tokenizer's {BYTES.vocab_size}",
    )
    if tokenizer == BYTES_NAME:  # another is read when training starts, and checked there
        require_model_ids(BYTES, model)
    require(
        model.vision_tower is None and model.stack.attention.mrope_section is None,
        "model.vision_tower and its stack.attention.mrope_section are parts of published models, which are read and "
        "run, and so is model.audio_tower; a run trains model.vision and model.audio",
    )
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
        frames, limit = spec.max_video_frames, model.vision.max_frames
        require(
            frames <= limit, f"encoding.max_video_frames={frames} is more than the model's vision.max_frames={limit}"
        )

"""`EncodedSequence`, the content of a batch's row at its own length, and the parts it is assembled from."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32
from numpy import ndarray

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.tokenizers.bytes import PAD


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPart:
    """A run of text tokens."""

    ids: Sequence[int] | Int32[ndarray, " tokens"]
    in_loss: bool = False  # whether the model learns to predict them
    evidence: Bool[ndarray, " tokens"] | None = None  # marks the tokens that carry the answer


@dataclasses.dataclass(frozen=True, eq=False)
class MediaPart:
    """The patches or frames of one picture, video or sound: an item with its own coordinates and time base."""

    modality: Modality
    features: Float32[ndarray, "rows X"]
    evidence: Bool[ndarray, " rows"]
    time: Int[ndarray, " rows"]  # index of the frame of a video or the chunk of a sound
    grid_row: Int[ndarray, " rows"]  # row of a patch on its frame's grid
    grid_column: Int[ndarray, " rows"]


Part = TokenPart | MediaPart


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSequence:
    """The fields of `core.batch.Batch` for one row without padding, with one example or several packed ones.

    A field has the name of the one in `Batch` without the B. T positions, P patches and S audio frames are as many as
    the sequence has.
    """

    tokens_T: Int32[ndarray, " T"]
    modality_T: Int32[ndarray, " T"]
    loss_mask_T: Bool[ndarray, " T"]
    evidence_T: Bool[ndarray, " T"]
    time_T: Int32[ndarray, " T"]
    segment_T: Int32[ndarray, " T"]
    position_T: Int32[ndarray, " T"]
    patches_PX: Float32[ndarray, "P XP"]
    patch_row_P: Int32[ndarray, " P"]
    patch_column_P: Int32[ndarray, " P"]
    patch_item_P: Int32[ndarray, " P"]
    frames_SX: Float32[ndarray, "S XA"]
    frame_item_S: Int32[ndarray, " S"]
    domain: int = 0  # this and the next: of the first segment
    question: int = 0
    level: int = 1
    example: int = 0
    pad: int = PAD  # the tokenizer's id of padding and of media positions

    @property
    def size(self) -> "Size":
        return Size(len(self.tokens_T), len(self.patches_PX), len(self.frames_SX))


@dataclasses.dataclass(frozen=True)
class Size:
    """Numbers of positions, patches and audio frames, of a sequence or of the room in a row."""

    positions: int
    patches: int
    frames: int

    @classmethod
    def of_row(cls, spec: EncodingSpec) -> "Size":
        return cls(spec.max_length, spec.max_patches, spec.max_frames)

    def __add__(self, other: "Size") -> "Size":
        return Size(self.positions + other.positions, self.patches + other.patches, self.frames + other.frames)

    def fits(self, room: "Size") -> bool:
        return self.positions <= room.positions and self.patches <= room.patches and self.frames <= room.frames


def assemble(parts: Sequence[Part], spec: EncodingSpec, *, pad: int = PAD, **indices: int) -> EncodedSequence:
    """Concatenates parts into one segment. Media are numbered in order, and there may be any number of any kind.

    Each token of a part in the loss is predicted from the position before it, so such a part cannot be first.

    Args:
      indices: `domain`, `question`, `level` and `example`.
    """
    lengths = [len(part.ids if isinstance(part, TokenPart) else part.features) for part in parts]
    bounds = [0, *itertools.accumulate(lengths)]
    T = bounds[-1]
    tokens, modality = np.full(T, pad, np.int32), np.full(T, Modality.TEXT, np.int32)
    loss_mask, evidence, time = np.zeros(T, bool), np.zeros(T, bool), np.zeros(T, np.int32)
    media: list[MediaPart] = []
    for part, begin, end in zip(parts, bounds[:-1], bounds[1:], strict=True):
        positions = slice(begin, end)
        if part.evidence is not None:
            evidence[positions] = part.evidence
        if isinstance(part, MediaPart):
            modality[positions], time[positions] = part.modality, part.time
            media.append(part)
            continue
        tokens[positions] = part.ids
        if part.in_loss:
            require(begin > 0, "the first part of a sequence is in the loss, but nothing before it can predict it")
            loss_mask[begin - 1 : end - 1] = True
    seen = [(item, part) for item, part in enumerate(media) if part.modality != Modality.AUDIO]
    heard = [(item, part) for item, part in enumerate(media) if part.modality == Modality.AUDIO]
    return EncodedSequence(
        tokens_T=tokens,
        modality_T=modality,
        loss_mask_T=loss_mask,
        evidence_T=evidence,
        time_T=time,
        segment_T=np.zeros(T, np.int32),
        position_T=np.arange(T, dtype=np.int32),
        patches_PX=_features(seen, spec.patch_features),
        patch_row_P=_ids([part.grid_row for _, part in seen]),
        patch_column_P=_ids([part.grid_column for _, part in seen]),
        patch_item_P=_items(seen),
        frames_SX=_features(heard, spec.frame_features),
        frame_item_S=_items(heard),
        pad=pad,
        **indices,
    )


def last_runs(mask_XT: Bool[ndarray, "*rows T"]) -> Bool[ndarray, "*rows T"]:
    """Keeps the last run of True in each row: of the learned tokens of a conversation, those of the last answer."""
    before = np.zeros_like(mask_XT)
    before[..., 1:] = mask_XT[..., :-1]
    number_XT = np.cumsum(mask_XT & ~before, axis=-1)
    return mask_XT & (number_XT == number_XT[..., -1:])


def concatenate(sequences: Sequence[EncodedSequence]) -> EncodedSequence:
    """Concatenates sequences into one row. Segments and items are renumbered; positions and times restart in each."""
    names = [name for name in _ARRAYS if name not in ("segment_T", "patch_item_P", "frame_item_S")]
    joined: dict[str, Any] = {name: np.concatenate([getattr(one, name) for one in sequences]) for name in names}
    segments, items = 0, 0
    numbered: dict[str, list[np.ndarray]] = {"segment_T": [], "patch_item_P": [], "frame_item_S": []}
    for one in sequences:
        numbered["segment_T"].append(one.segment_T + np.int32(segments))
        numbered["patch_item_P"].append(one.patch_item_P + np.int32(items))
        numbered["frame_item_S"].append(one.frame_item_S + np.int32(items))
        segments += int(one.segment_T.max(initial=-1)) + 1
        items += max(int(ids.max(initial=-1)) for ids in (one.patch_item_P, one.frame_item_S)) + 1
    joined |= {name: np.concatenate(ids) for name, ids in numbered.items()}
    return dataclasses.replace(sequences[0], **joined)


def padded(sequence: EncodedSequence, spec: EncodingSpec) -> dict[str, np.ndarray]:
    """Pads a sequence to the sizes of `spec`; returns the fields of `core.batch.Batch` without batch dimension.

    Raises:
      UserError: if the sequence does not fit.
    """
    size, room = sequence.size, Size.of_row(spec)
    require(
        size.fits(room),
        f"a sequence of {size.positions} positions, {size.patches} patches and {size.frames} audio frames does not fit "
        f"in a row of {room.positions}, {room.patches} and {room.frames}: encoding.max_length, max_patches, max_frames",
    )
    lengths = {"T": room.positions, "P": room.patches, "S": room.frames}
    fields = {batch: _pad(getattr(sequence, name), lengths[axis]) for name, batch, axis in _FIELDS}
    T = size.positions
    if 0 < T < room.positions:  # padding continues the last segment
        fields["segment_BT"][T:] = sequence.segment_T[-1]
        fields["position_BT"][T:] = sequence.position_T[-1] + np.arange(1, room.positions - T + 1)
    if room.positions > T:
        fields["tokens_BT"][T:] = sequence.pad
    fields["valid_BT"] = np.arange(room.positions) < T
    for name in ("domain", "question", "level", "example"):
        fields[f"{name}_B"] = np.asarray(getattr(sequence, name), np.int32)
    return fields


def _field(name: str) -> tuple[str, str, str]:
    """Returns a field's name, its name in `Batch`, and the letter of its first axis ("patch_row_P" -> "P")."""
    stem, _, axes = name.rpartition("_")
    return name, f"{stem}_B{axes}", axes[0]


_ARRAYS = [field.name for field in dataclasses.fields(EncodedSequence) if field.default is dataclasses.MISSING]
_FIELDS = [_field(name) for name in _ARRAYS]


def _pad(values: np.ndarray, rows: int) -> np.ndarray:
    if len(values) == rows:
        return values
    out = np.zeros((rows, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    return out


def _features(media: Sequence[tuple[int, MediaPart]], width: int) -> np.ndarray:
    if not media:
        return np.zeros((0, width), np.float32)
    if len(media) == 1:
        return media[0][1].features
    return np.concatenate([np.zeros((0, width), np.float32), *(part.features for _, part in media)])


def _items(media: Sequence[tuple[int, MediaPart]]) -> np.ndarray:
    return _ids([np.full(len(part.features), item) for item, part in media])


def _ids(values: Sequence[np.ndarray]) -> np.ndarray:
    if not values:
        return np.zeros(0, np.int32)
    return np.concatenate([np.zeros(0, np.int32), *values]).astype(np.int32)

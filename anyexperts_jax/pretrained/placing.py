"""Assigns rows of the towers to the placeholders among the tokens, and rotary positions to all tokens."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int
from numpy import ndarray

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.core.rounding import round_up
from anyexperts_jax.models.audio_tower import Sounds
from anyexperts_jax.models.placed_media import PlacedMedia
from anyexperts_jax.models.vision_tower import Frames
from anyexperts_jax.pretrained.media import Shown

_SQUARE_STEP = 16  # frames are padded to a multiple of this many merged squares, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Placed:
    """The placed media of a batch, and for each row how far its rotary positions lag behind its number of tokens."""

    media: PlacedMedia
    lead_B: Float[Array, "B"]


class _Span(NamedTuple):
    """Consecutive placeholders, without other tokens between them."""

    row_N: Int[ndarray, " N"]  # rows of the tower
    offset_N3: Float32[ndarray, "N 3"]  # rotary offsets from the position where the span starts
    size: str  # how many placeholders are needed, for error messages


def place(shown: Shown, tokens_BT: Int[ndarray, "B T"], valid_BT: Bool[ndarray, "B T"]) -> Placed:
    """Assigns a row of a tower to each placeholder, and a rotary position (time, row, column) to every token.

    In text and sound the position grows by one per token. All rows of a picture have the position where it starts as
    their time, and add their own row and column to it. A pair of frames of a video is placed like a picture, or, if the
    model encodes time as position, at its second. The token after a span continues one behind its greatest position.

    Raises:
      UserError: if the placeholders do not match the media.
    """
    row_BT = np.full(tokens_BT.shape, -1, np.int32)
    modality_BT = np.full(tokens_BT.shape, int(Modality.TEXT), np.int32)
    rotary_BT3 = np.zeros((*tokens_BT.shape, 3), np.float32)
    lead_B = np.zeros(len(tokens_BT), np.float32)
    frames, sounds = _stack_frames(shown), _Windows(shown)
    queues = _Queues(shown, frames, sounds)
    for b, tokens_T in enumerate(tokens_BT):
        kept = np.flatnonzero(valid_BT[b])
        t, position = 0, np.float32(0)
        while t < len(kept):
            modality = shown.ids.modality_of(int(tokens_T[kept[t]]))
            if modality is None:
                rotary_BT3[b, kept[t]] = position
                t, position = t + 1, position + np.float32(1)
                continue
            span = queues.next(modality)
            count, name = len(span.row_N), modality.name.lower()
            places = kept[t : t + count]
            own = [shown.ids.modality_of(int(i)) for i in tokens_T[places]]
            require(
                modality is not Modality.VIDEO or Modality.AUDIO not in own,
                f"row {b} of the tokens has sound inside a video, which is not read; give it as a sound of its own",
            )
            require(
                own == [modality] * count,
                f"row {b} of the tokens has fewer places from {kept[t]} on than the {span.size} that its {name} needs; "
                f"make the tokens with m.tokens(prompt, {name}s=...)",
            )
            modality_BT[b, places] = int(modality)
            row_BT[b, places] = span.row_N
            rotary_BT3[b, places] = position + span.offset_N3
            t, position = t + count, position + span.offset_N3.max() + np.float32(1)
        lead_B[b] = len(kept) - position
    queues.require_none_left()
    arrays = (jnp.asarray(own) for own in (row_BT, modality_BT, rotary_BT3))
    return Placed(
        PlacedMedia(frames.frames if frames is not None else None, sounds.stack(), *arrays), jnp.asarray(lead_B)
    )


class _Queues:
    """The spans of each modality, in reading order."""

    def __init__(self, shown: Shown, frames: "_Stacked | None", sounds: "_Windows") -> None:
        self._shown = shown
        self._queues: dict[Modality, Iterator[_Span]] = {}
        first = 0
        for modality in (Modality.IMAGE, Modality.VIDEO):
            rows = frames.rows_per_frame if frames is not None else 0
            spans, first = _picture_spans(shown, modality, first, rows)
            self._queues[modality] = iter(spans)
        self._queues[Modality.AUDIO] = iter(sounds.spans())

    def next(self, modality: Modality) -> _Span:
        span = next(self._queues[modality], None)
        kind = modality.name.lower()
        given = len(self._shown.of(modality))
        require(span is not None, f"the tokens have places for more {kind}s than are given ({given})")
        assert span is not None
        return span

    def require_none_left(self) -> None:
        for modality, queue in self._queues.items():
            left = len(list(queue))
            kind = modality.name.lower()
            what = "sounds" if modality is Modality.AUDIO else "frames"
            require(left == 0, f"{kind}s are given that the tokens have no places for ({left} {what})")


@dataclasses.dataclass(frozen=True)
class _Stacked:
    frames: Frames
    rows_per_frame: int


def _stack_frames(shown: Shown) -> _Stacked | None:
    """Stacks the frames of pictures, then of videos; None if there are none."""
    every = [frame for modality in (Modality.IMAGE, Modality.VIDEO) for frame in shown.frames(modality)]
    if not every:
        return None
    tower = shown.vision
    step = _SQUARE_STEP * tower.merge**2
    length = round_up(max(len(patches) for patches, _ in every), step)
    patches_FPX = np.zeros((len(every), length, tower.patch_features), np.float32)
    for number, (patches, _) in enumerate(every):
        patches_FPX[number, : len(patches)] = patches
    grid_F2 = np.array([grid for _, grid in every], np.int32)
    return _Stacked(Frames(jnp.asarray(patches_FPX), jnp.asarray(grid_F2)), length // tower.merge**2)


def _picture_spans(shown: Shown, modality: Modality, first: int, rows_per_frame: int) -> tuple[list[_Span], int]:
    """Returns the spans of pictures or videos, and the index after their last frame.

    Args:
      first: the index of their first frame.
    """
    steps, merge, found = shown.ids.steps, shown.vision.merge, []
    for item in shown.of(modality):
        pairs, rows, columns = item.grid[0], item.grid[1] // merge, item.grid[2] // merge
        grid = np.stack(np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
        offset_N3 = grid.reshape(-1, 3).astype(np.float32)
        own = [(first + pair) * rows_per_frame + np.arange(rows * columns) for pair in range(pairs)]
        first += pairs
        size = f"{rows} x {columns} rows"
        if modality is Modality.IMAGE or steps is None:
            found += [_Span(row_N, offset_N3, size) for row_N in own]
            continue
        seconds = np.arange(pairs, dtype=np.float32) * np.float32(item.pair_seconds) * np.float32(steps)
        time_pairs_N3 = np.stack([offset_N3] * pairs)
        time_pairs_N3[:, :, 0] = seconds[:, None]
        found.append(_Span(np.concatenate(own), time_pairs_N3.reshape(-1, 3), f"{pairs} x {size}"))
    return found, first


class _Windows:
    """Sounds cut into windows of chunks."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._sounds = shown.of(Modality.AUDIO)
        self._windows: list[tuple[int, list[np.ndarray]]] = []  # (index of the sound, chunks of the window)
        for number, sound in enumerate(self._sounds):
            assert shown.audio is not None
            size, most = shown.audio.chunk_frames, shown.audio.window_chunks
            chunks = [sound.mel_SX[i : i + size] for i in range(0, len(sound.mel_SX), size)]
            self._windows += [(number, chunks[i : i + most]) for i in range(0, len(chunks), most)]
        longest = max((len(chunks) for _, chunks in self._windows), default=0)
        self._chunks = _power_of_two(longest)

    def spans(self) -> list[_Span]:
        """Returns the span of each sound."""
        tower, own = self._shown.audio, dict[int, list[np.ndarray]]()
        for w, (number, chunks) in enumerate(self._windows):
            assert tower is not None
            for a, chunk in enumerate(chunks):
                rows = (w * self._chunks + a) * tower.chunk_rows + np.arange(tower.rows(len(chunk)))
                own.setdefault(number, []).append(rows)
        found = []
        for parts in own.values():
            row_N = np.concatenate(parts)
            offset_N3 = np.repeat(np.arange(len(row_N), dtype=np.float32)[:, None], 3, axis=1)
            found.append(_Span(row_N, offset_N3, f"{len(row_N)} rows"))
        return found

    def stack(self) -> Sounds | None:
        """Stacks the windows into arrays; None without sounds. Windows of padding have one frame of zeros."""
        tower = self._shown.audio
        if not self._windows or tower is None:
            return None
        windows, size = _power_of_two(len(self._windows)), tower.chunk_frames
        mel_IOSX = np.zeros((windows, self._chunks, size, tower.mel_bins), np.float32)
        frames_IO = np.zeros((windows, self._chunks), np.int32)
        frames_IO[len(self._windows) :, 0] = 1
        width_IO = np.full((windows, self._chunks), size, np.int32)
        for w, (number, chunks) in enumerate(self._windows):
            width_IO[w] = min(size, len(self._sounds[number].mel_SX))
            for a, chunk in enumerate(chunks):
                mel_IOSX[w, a, : len(chunk)] = chunk
                frames_IO[w, a] = len(chunk)
        return Sounds(*(jnp.asarray(own) for own in (mel_IOSX, frames_IO, width_IO)))


def _power_of_two(least: int) -> int:
    """Rounds up to a power of two, so that few programs are compiled."""
    return 1 << max(least - 1, 0).bit_length()

"""Where pictures and videos go in a prompt: the places in its text, the rows they read, and the rotary positions."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from numpy import ndarray

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.models.config import VisionTowerConfig
from anyexperts_jax.models.vision_tower import Frames, PlacedFrames
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.pictures import Patches
from anyexperts_jax.tokenizers.base import Tokenizer

_SQUARE_STEP = 16  # frames are padded to a multiple of so many squares, so that few programs are compiled
_KEYS = {
    "image": ("image_token_id", 151655),
    "video": ("video_token_id", 151656),
    "start": ("vision_start_token_id", 151652),
    "end": ("vision_end_token_id", 151653),
}


@dataclasses.dataclass(frozen=True)
class PlaceIds:
    """The ids that mark a row of a picture and a row of a video, and those that open and close either."""

    image: int
    video: int
    start: int
    end: int

    @classmethod
    def of(cls, hub: HubConfig) -> "PlaceIds":
        """Reads them from a config.json. A missing one has the default of transformers' class.

        Raises:
          UserError: when one is not a whole number.
        """
        return cls(**{name: hub.whole(key, default) for name, (key, default) in _KEYS.items()})

    def texts(self, tokenizer: Tokenizer) -> dict[str, str]:
        """The text of each id, by name.

        Raises:
          UserError: when an id is not a token of the tokenizer.
        """
        found = {}
        for name, number in dataclasses.asdict(self).items():
            text = tokenizer.pieces([number])[0] if number < tokenizer.vocab_size else ""
            same = bool(text) and tokenizer.encode_rendered(text).ids_T.tolist() == [number]
            require(same, f"{_KEYS[name][0]}={number} of config.json is no token of the tokenizer {tokenizer.name!r}")
            found[name] = text
        return found


@dataclasses.dataclass(frozen=True)
class Shown:
    """Pictures and videos in the order in which a batch of prompts reads them."""

    items: tuple[Patches, ...]
    tower: VisionTowerConfig
    ids: PlaceIds

    def of(self, modality: Modality) -> list[Patches]:
        return [item for item in self.items if item.modality is modality]

    def frames(self, modality: Modality) -> list[tuple[ndarray, tuple[int, int]]]:
        """(patches, grid) of each frame that the tower reads on its own."""
        found = []
        for item in self.of(modality):
            parts = np.split(item.patches_NX, item.grid[0])
            found += [(part, item.grid[1:]) for part in parts]
        return found

    def place_text(self, item: Patches, texts: Mapping[str, str]) -> str:
        """The text that stands for one item in a prompt. Each frame of a video comes after its time in seconds."""
        rows = item.patches_per_frame // self.tower.merge**2
        if item.modality is Modality.IMAGE:
            return texts["start"] + texts["image"] * rows + texts["end"]
        frame = texts["start"] + texts["video"] * rows + texts["end"]
        return "".join(f"<{second:.1f} seconds>{frame}" for second in item.seconds)

    def fill(self, text: str, texts: Mapping[str, str]) -> str:
        """Expands a rendered conversation: each item's single place becomes a place for each of its rows.

        Raises:
          UserError: when the conversation does not have as many places as there are items.
        """
        own = {"image": self.of(Modality.IMAGE), "video": self.of(Modality.VIDEO)}
        for name, items in own.items():
            made, given = text.count(texts[name]), len(items)
            require(made == given, f"the chat template made {made} places of kind {name}, but {given} are given")
        queues = {name: iter(items) for name, items in own.items()}
        done, rest = "", text
        while places := [(rest.find(texts[name]), name) for name in queues if texts[name] in rest]:
            at, name = min(places)
            before, after = rest[:at], rest[at + len(texts[name]) :]
            done += before.removesuffix(texts["start"]) + self.place_text(next(queues[name]), texts)
            rest = after.removeprefix(texts["end"])
        return done + rest


@dataclasses.dataclass(frozen=True)
class Placed:
    """The frames and places of a batch, and by how much rotary positions lag behind the places of each row."""

    frames: PlacedFrames
    lead_B: Int[Array, "B"]


def place(shown: Shown, tokens_BT: Int[ndarray, "B T"], valid_BT: Bool[ndarray, "B T"]) -> Placed:
    """Assigns a row of the tower to each place among the tokens, and a rotary position to every token.

    Along text the position grows by one a token. The rows of a picture share the position where it starts as their
    time, and add their own row and column. The next token continues after the picture's longer side. Every pair of
    frames of a video is placed like a picture.

    Raises:
      UserError: when the places do not fit the pictures.
    """
    row_BT = np.full(tokens_BT.shape, -1, np.int32)
    modality_BT = np.full(tokens_BT.shape, int(Modality.TEXT), np.int32)
    rotary_BT3 = np.zeros((*tokens_BT.shape, 3), np.int32)
    lead_B = np.zeros(len(tokens_BT), np.int32)
    walk = _Frames(shown)
    stacked = walk.stacked()
    for b, tokens_T in enumerate(tokens_BT):
        kept = np.flatnonzero(valid_BT[b])
        t, position = 0, 0
        while t < len(kept):
            modality = walk.modality_of(int(tokens_T[kept[t]]))
            if modality is None:
                rotary_BT3[b, kept[t]] = position
                t, position = t + 1, position + 1
                continue
            number, (rows, columns) = walk.next(modality)
            span = kept[t : t + rows * columns]
            whole = len(span) == rows * columns and all(walk.modality_of(int(i)) is modality for i in tokens_T[span])
            require(
                whole,
                f"row {b} of the tokens has fewer places from {kept[t]} on than the {rows} x {columns} rows that its "
                f"{modality.name.lower()} needs; make the tokens with m.tokens(prompt, images=...)",
            )
            modality_BT[b, span] = int(modality)
            row_BT[b, span] = number * stacked.rows_per_frame + np.arange(rows * columns)
            grid = np.stack(np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
            rotary_BT3[b, span] = position + grid.reshape(-1, 3)
            t, position = t + rows * columns, position + max(rows, columns)
        lead_B[b] = len(kept) - position
    walk.require_none_left()
    placed = PlacedFrames(stacked.frames, *(jnp.asarray(own) for own in (row_BT, modality_BT, rotary_BT3)))
    return Placed(placed, jnp.asarray(lead_B))


@dataclasses.dataclass(frozen=True)
class _Stacked:
    frames: Frames
    rows_per_frame: int


class _Frames:
    """The frames of pictures, then of videos, numbered in this order; each kind has a queue of its own."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        own = {kind: shown.frames(kind) for kind in (Modality.IMAGE, Modality.VIDEO)}
        self._all = [*own[Modality.IMAGE], *own[Modality.VIDEO]]
        numbers = range(len(self._all))
        first = len(own[Modality.IMAGE])
        self._queues: dict[Modality, Iterator[int]] = {
            Modality.IMAGE: iter(numbers[:first]),
            Modality.VIDEO: iter(numbers[first:]),
        }

    def modality_of(self, token: int) -> Modality | None:
        """The modality that the token is a place for; None for text."""
        ids = self._shown.ids
        return {ids.image: Modality.IMAGE, ids.video: Modality.VIDEO}.get(token)

    def next(self, modality: Modality) -> tuple[int, tuple[int, int]]:
        """(the number of the next frame of the kind, the rows and columns it gives)."""
        number = next(self._queues[modality], None)
        kind = modality.name.lower()
        given = len(self._shown.of(modality))
        require(number is not None, f"the tokens have places for more {kind}s than are given ({given})")
        assert number is not None
        grid, merge = self._all[number][1], self._shown.tower.merge
        return number, (grid[0] // merge, grid[1] // merge)

    def require_none_left(self) -> None:
        for modality, queue in self._queues.items():
            left = len(list(queue))
            kind = modality.name.lower()
            require(left == 0, f"{kind}s are given that the tokens have no places for ({left} frames)")

    def stacked(self) -> _Stacked:
        tower = self._shown.tower
        longest = max(len(patches) for patches, _ in self._all)
        step = _SQUARE_STEP * tower.merge**2
        length = -(-longest // step) * step
        patches_FPX = np.zeros((len(self._all), length, tower.patch_features), np.float32)
        for number, (patches, _) in enumerate(self._all):
            patches_FPX[number, : len(patches)] = patches
        grid_F2 = np.array([grid for _, grid in self._all], np.int32)
        return _Stacked(Frames(jnp.asarray(patches_FPX), jnp.asarray(grid_F2)), length // tower.merge**2)

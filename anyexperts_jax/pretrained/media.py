"""The placeholders of pictures, videos and sounds in the text of a prompt."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.models.config import AudioTowerConfig, ModelConfig, VisionTowerConfig
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.pictures import Patches, listed, patches_of
from anyexperts_jax.pretrained.sounds import Sound, sounds_of
from anyexperts_jax.tokenizers.base import Tokenizer

KINDS = {"image": Modality.IMAGE, "video": Modality.VIDEO, "audio": Modality.AUDIO}
Given = Mapping[str, Sequence[Any]]  # media by kind
_STEPS = 25  # position_id_per_seconds's default in Qwen3-Omni's class
_KEYS = {
    "image": ("image_token_id", 151655),
    "video": ("video_token_id", 151656),
    "start": ("vision_start_token_id", 151652),
    "end": ("vision_end_token_id", 151653),
}
_SOUND_KEYS = {"audio": "audio_token_id", "audio_start": "audio_start_token_id", "audio_end": "audio_end_token_id"}


def readable_kinds(config: ModelConfig) -> tuple[str, ...]:
    """Returns the kinds of media that a model reads."""
    sees, hears = config.vision_tower is not None, config.audio_tower is not None
    return ("image", "video")[: 2 * sees] + ("audio",)[:hears]


@dataclasses.dataclass(frozen=True)
class PlaceIds:
    """The placeholder ids, one per row of a picture, video or sound, and the ids that open and close them."""

    image: int
    video: int
    start: int
    end: int
    audio: int | None = None  # this and the next two are None if the model reads no sound
    audio_start: int | None = None
    audio_end: int | None = None
    steps: int | None = None  # rotary positions per second of video; None: frames get positions like pictures

    @classmethod
    def of(cls, hub: HubConfig) -> "PlaceIds":
        """Reads the ids from a config.json. Those of pictures default to those of transformers' class.

        Raises:
          UserError: if one is not a whole number.
        """
        hub = hub.thinker
        own = {name: hub.whole(key, default) for name, (key, default) in _KEYS.items()}
        if hub.get("audio_config") is None:
            return cls(**own)
        heard = {name: hub.whole(key) for name, key in _SOUND_KEYS.items()}
        return cls(**own, **heard, steps=hub.whole("position_id_per_seconds", _STEPS))

    def modality_of(self, token: int) -> Modality | None:
        """Returns the modality that the token is a placeholder for; None for text."""
        return {self.image: Modality.IMAGE, self.video: Modality.VIDEO, self.audio: Modality.AUDIO}.get(token)

    def texts(self, tokenizer: Tokenizer) -> dict[str, str]:
        """Returns the text of each id, by name.

        Raises:
          UserError: if an id is not a token of the tokenizer.
        """
        found = {}
        named = {**{name: key for name, (key, _) in _KEYS.items()}, **_SOUND_KEYS}
        for name, key in named.items():
            number = getattr(self, name)
            if number is None:
                continue
            text = tokenizer.pieces([number])[0] if number < tokenizer.vocab_size else ""
            same = bool(text) and tokenizer.encode_rendered(text).ids_T.tolist() == [number]
            require(same, f"{key}={number} of config.json is no token of the tokenizer {tokenizer.name!r}")
            found[name] = text
        return found


@dataclasses.dataclass(frozen=True)
class Shown:
    """The pictures, videos and sounds of a batch of prompts, in the order in which the prompts refer to them."""

    items: tuple[Patches | Sound, ...]
    vision: VisionTowerConfig
    audio: AudioTowerConfig | None
    ids: PlaceIds

    @classmethod
    def joined(cls, every: "Sequence[Shown | None]") -> "Shown | None":
        """Puts the media of several prompts of one model in sequence; None if there are none."""
        some = [shown for shown in every if shown is not None]
        items = tuple(item for shown in some for item in shown.items)
        return dataclasses.replace(some[0], items=items) if some else None

    @classmethod
    def of_model(cls, given: Given, config: ModelConfig, hub: HubConfig, path: pathlib.Path) -> "Shown | None":
        """Preprocesses the given media for a model; None if there are none.

        Args:
          given: pictures, videos and sounds, by kind.
          path: the checkpoint, whose settings are used.

        Raises:
          UserError: if the model does not read this kind, or an item cannot be decoded.
        """
        lists = {kind: listed(f"{kind}s", given.get(kind, ())) for kind in KINDS}
        some = [f"{kind}s" for kind, own in lists.items() if own]
        if not some:
            return None
        kinds = " and ".join(some)
        require(config.vision_tower is not None, f"the model in {path} reads text alone, but {kinds} are given")
        assert config.vision_tower is not None
        ids = PlaceIds.of(hub)
        pictures = (lists["image"], lists["video"])
        timed = ids.steps is not None
        items: list[Patches | Sound] = [*patches_of(*pictures, path, config.vision_tower, per_frame=timed)]
        if lists["audio"]:
            require(config.audio_tower is not None, f"the model in {path} hears no sound, but audios are given")
            assert config.audio_tower is not None
            items += sounds_of(lists["audio"], path, config.audio_tower)
        return cls(tuple(items), config.vision_tower, config.audio_tower, ids)

    def of(self, modality: Modality) -> list[Any]:
        """Returns the items of one modality: `Patches`, or `Sound`."""
        return [item for item in self.items if item.modality is modality]

    def frames(self, modality: Modality) -> list[tuple[ndarray, tuple[int, int]]]:
        """Returns (patches, grid) of each frame; the tower encodes every frame separately."""
        found = []
        for item in self.of(modality):
            parts = np.split(item.patches_NX, item.grid[0])
            found += [(part, item.grid[1:]) for part in parts]
        return found

    def sound_rows(self, sound: Sound) -> int:
        """Returns how many rows the tower makes of a sound."""
        assert self.audio is not None
        whole, rest = divmod(len(sound.mel_SX), self.audio.chunk_frames)
        return whole * self.audio.chunk_rows + self.audio.rows(rest)

    def place_text(self, item: Patches | Sound, texts: Mapping[str, str]) -> str:
        """Returns the placeholder text of one item.

        If the frames of a video are placed like pictures, each follows its time in seconds.
        """
        if isinstance(item, Sound):
            return texts["audio_start"] + texts["audio"] * self.sound_rows(item) + texts["audio_end"]
        rows = item.patches_per_frame // self.vision.merge**2
        if item.modality is Modality.IMAGE:
            return texts["start"] + texts["image"] * rows + texts["end"]
        if self.ids.steps is not None:
            return texts["start"] + texts["video"] * rows * item.grid[0] + texts["end"]
        frame = texts["start"] + texts["video"] * rows + texts["end"]
        return "".join(f"<{second:.1f} seconds>{frame}" for second in item.seconds)

    def fill(self, text: str, texts: Mapping[str, str]) -> str:
        """Replaces each item's single placeholder in a rendered conversation by one placeholder per row.

        Raises:
          UserError: if the numbers of placeholders and items differ.
        """
        own = {kind: self.of(modality) for kind, modality in KINDS.items() if kind in texts}
        for kind, items in own.items():
            made, given = text.count(texts[kind]), len(items)
            require(made == given, f"the chat template made {made} places of kind {kind}, but {given} are given")
        queues = {kind: iter(items) for kind, items in own.items()}
        done, rest = "", text
        while places := [(rest.find(texts[kind]), kind) for kind in queues if texts[kind] in rest]:
            at, kind = min(places)
            before, after = rest[:at], rest[at + len(texts[kind]) :]
            opens, closes = ("audio_start", "audio_end") if kind == "audio" else ("start", "end")
            done += before.removesuffix(texts[opens]) + self.place_text(next(queues[kind]), texts)
            rest = after.removeprefix(texts[closes])
        return done + rest

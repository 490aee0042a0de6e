"""Turns pictures and videos into patches for a vision tower, following the checkpoint's preprocessor_config.json."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, comma_list, require, shown
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.decode import decode_film_file, decode_picture, decode_video
from anyexperts_jax.models.config import VisionTowerConfig
from anyexperts_jax.pretrained.hub_config import HubConfig, keys

IMAGES, VIDEOS, BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
_FLATTEST = 200  # largest ratio of a picture's sides
_RATES = (1e-3, 1e3)  # frames per second of a video given as frames
_OMNI_FRAME = {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}  # pixels per frame in Qwen3-Omni
_RESAMPLE = range(4)  # Pillow's numbers: nearest, Lanczos, bilinear, bicubic
SETTINGS = keys(
    """
    do_resize do_rescale do_normalize do_convert_rgb do_center_crop do_pad size min_pixels max_pixels resample
    rescale_factor image_mean image_std patch_size temporal_patch_size merge_size do_sample_frames fps min_frames
    max_frames num_frames cap_pixels_per_frame
    processor_class image_processor_type video_processor_type feature_extractor_type data_format input_data_format
    device return_tensors disable_grouping default_to_square crop_size pad_size return_metadata video_metadata
    max_video_tokens max_image_size max_duration
    feature_size sampling_rate hop_length n_fft n_samples nb_max_frames chunk_length dither padding_value padding_side
    return_attention_mask
    """
)  # for pictures, videos and sounds, since they may share a file


@dataclasses.dataclass(frozen=True)
class Video:
    """A video for a published model.

    Attributes:
      frames: pictures of equal size, an array [F, H, W, 3], or the path or bytes of a file.
      fps: frames per second, from which the model learns the time of each frame; None for a file, which has it.
    """

    frames: Any
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.of_file:
            require(self.fps is None, f"fps={shown(self.fps)} of a video in a file: leave it out, the file says it")
            return
        real = isinstance(self.fps, int | float) and math.isfinite(self.fps) and self.fps > 0
        require(real, f"fps={shown(self.fps)} of a video must be a number > 0")
        low, high = _RATES
        require(low <= (self.fps or 0) <= high, f"fps={shown(self.fps)} of a video must be from {low:g} to {high:g}")

    @property
    def of_file(self) -> bool:
        """Whether `frames` is the path or the bytes of a file."""
        return isinstance(self.frames, str | bytes | pathlib.Path)

    def decoded(self, where: str, most: int) -> tuple[UInt8[ndarray, "F H W 3"], float]:
        """Decodes the video; returns (frames, frames per second).

        Args:
          where: its name in error messages.
          most: maximal number of frames to take from a file.

        Raises:
          UserError: if it cannot be decoded.
        """
        source = pathlib.Path(self.frames) if isinstance(self.frames, str) else self.frames
        if self.of_file:
            return decode_film_file(source, where, most)
        assert self.fps is not None
        return decode_video(source, where), self.fps


class Patches(NamedTuple):
    """The patches of a picture or a video."""

    patches_NX: Float32[ndarray, "N X"]
    grid: tuple[int, int, int]  # pairs of frames, rows and columns of patches
    modality: Modality
    seconds: tuple[float, ...]  # when each pair of frames is shown; empty for a picture
    pair_seconds: float = 1.0  # seconds from pair to pair, for models that encode time as position

    @property
    def patches_per_frame(self) -> int:
        return self.grid[1] * self.grid[2]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How pixels become patches. Pictures and videos have separate settings; see `read_preprocessing`."""

    tower: VisionTowerConfig
    least_pixels: int  # of a picture, or of all frames of a video together, after resizing
    most_pixels: int
    resample: int  # Pillow's number of the filter
    resize: bool
    scale: float  # multiplies the pixels
    mean: tuple[float, ...]  # per channel, subtracted from the scaled pixels
    std: tuple[float, ...]  # per channel, divides what is left
    fps: float = 2.0  # frames sampled per second of video
    min_frames: int = 4  # of a video that has as many
    max_frames: int = 768
    per_frame: bool = (
        False  # whether a video's limits of pixels hold for each frame, as in Qwen2-VL, or for all together
    )

    def picture(self, value: Any, where: str) -> Patches:
        """Returns the patches of one picture: a path, a Pillow image, or an array [H, W, 3].

        Raises:
          UserError: naming it by `where`, if it cannot be decoded or is too flat.
        """
        source = pathlib.Path(value) if isinstance(value, str) else value
        pixels_HW3 = decode_picture(source, where)
        frames = np.repeat(self._normalise(pixels_HW3[None], 1, where), self.tower.temporal_patch_size, axis=0)
        return Patches(*self._cut(frames), Modality.IMAGE, ())

    def video(self, value: Any, where: str) -> Patches:
        """Returns the patches of a `Video`, from frames sampled evenly over its length.

        Raises:
          UserError: naming it by `where`, if it cannot be decoded, is too short or too flat.
        """
        message = f"{where} is a {type(value).__name__}; give Video(frames, fps), or Video(file)"
        require(isinstance(value, Video), message)
        pair = self.tower.temporal_patch_size
        frames_FHW3, fps = value.decoded(where, self.max_frames)
        total = len(frames_FHW3)
        require(total >= pair, f"{where} has {total} frames; the model reads {pair} at a time")
        taken = self._sample_frames(total, total / fps, pair)
        count, rate = len(taken), len(taken) * fps / total
        frames = self._normalise(frames_FHW3[taken], pair, where)
        missing = -count % pair
        taken = np.concatenate([taken, np.repeat(taken[-1:], missing)])
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        first, last = taken.reshape(-1, pair)[:, 0], taken.reshape(-1, pair)[:, -1]
        seconds = tuple(float(own) for own in (first / fps + last / fps) / 2)
        return Patches(*self._cut(frames), Modality.VIDEO, seconds, pair / rate)

    def _sample_frames(self, total: int, seconds: float, pair: int) -> np.ndarray:
        """Returns the indices of the frames to read, evenly spread over the video."""
        wanted = seconds * self.fps
        if self.per_frame:
            count = max(int(min(max(wanted, self.min_frames), self.max_frames, total)) // pair, 1) * pair
            return (np.arange(count) * (total / count)).astype(int)
        count = min(max(int(wanted), self.min_frames), self.max_frames, total)
        return np.linspace(0, total - 1, count).round().astype(int)

    def _normalise(self, frames_FHW3: UInt8[ndarray, "F H W 3"], pair: int, where: str) -> np.ndarray:
        height, width = frames_FHW3.shape[1:3]
        if self.resize:
            counted = (1, 1) if self.per_frame else (len(frames_FHW3), pair)
            new = self.resized(counted[0], height, width, counted[1], where)
            frames_FHW3 = np.stack([_resize(frame, new, self.resample) for frame in frames_FHW3])
        factor = self.tower.patch_size * self.tower.merge
        height, width = frames_FHW3.shape[1:3]
        message = f"{where} has {height} x {width} pixels; without do_resize both must be multiples of {factor}"
        require(height % factor == 0 and width % factor == 0, message)
        pixels = frames_FHW3.astype(np.float32) * np.float32(self.scale)
        mean, std = (np.asarray(own, np.float32) for own in (self.mean, self.std))
        return (pixels - mean[None, None, None]) / std[None, None, None]

    def resized(self, frames: int, height: int, width: int, pair: int, where: str) -> tuple[int, int]:
        """Returns the size (height, width) to resize to.

        Both sides are multiples of a merged square's side, their ratio is close to the picture's own, and the number of
        pixels is within the limits.

        Args:
          frames: number of frames of a video; 1 for a picture.
          pair: frames per patch; 1 for a picture.

        Raises:
          UserError: for a picture that is too flat.
        """
        factor = self.tower.patch_size * self.tower.merge
        if pair > 1 and min(height, width) < factor:
            grown = max(factor / height, factor / width)
            height, width = int(height * grown), int(width * grown)
        flat = f"{where} has {height} x {width} pixels; a side may be at most {_FLATTEST} times the other: cut it"
        require(max(height, width) <= _FLATTEST * min(height, width), flat)
        area = height * width * frames
        new = [round(side / factor) * factor for side in (height, width)]
        held = round(frames / pair) * pair * new[0] * new[1]
        if held > self.most_pixels:
            shrink = math.sqrt(area / self.most_pixels)
            new = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
        elif held < self.least_pixels:
            grow = math.sqrt(self.least_pixels / area)
            new = [math.ceil(side * grow / factor) * factor for side in (height, width)]
        return new[0], new[1]

    def _cut(self, frames_FHW3: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Cuts frames into patches, in the order of `models.vision_tower.Frames`; returns them and their grid."""
        size, merge, pair = self.tower.patch_size, self.tower.merge, self.tower.temporal_patch_size
        count, height, width, channels = frames_FHW3.shape
        grid = (count // pair, height // size, width // size)
        inside = (grid[1] // merge, merge, size), (grid[2] // merge, merge, size)
        cut = frames_FHW3.reshape(grid[0], pair, *inside[0], *inside[1], channels)
        # Merged squares first, then the patches of a square, then within a patch channel, frame and pixels.
        ordered = cut.transpose((0, 2, 5, 3, 6, 8, 1, 4, 7))
        return np.ascontiguousarray(ordered.reshape(math.prod(grid), -1)), grid


def listed(name: str, given: Any) -> list[Any]:
    """Returns the given pictures, videos or sounds as a list.

    Raises:
      UserError: if a single item is given, such as a path.
    """
    one = isinstance(given, str | bytes | Video) or not isinstance(given, Sequence | ndarray)
    one = one or (isinstance(given, ndarray) and given.ndim < 2)  # the samples of one sound
    require(not one, f"{name} is a {type(given).__name__}; give a list")
    return list(given)


def patches_of(
    images: Sequence[Any],
    videos: Sequence[Any],
    path: pathlib.Path,
    tower: VisionTowerConfig,
    *,
    per_frame: bool = False,
) -> list[Patches]:
    """Returns the patches of pictures, then of videos. Items that are `Patches` already are checked and kept.

    Args:
      path: the checkpoint, whose settings are used.
      per_frame: whether videos are read as Qwen2-VL reads them; see `Preprocessing`.

    Raises:
      UserError: for an item that cannot be decoded; the message has its index.
    """
    found = []
    for name, given, is_video in (("image", images, False), ("video", videos, True)):
        settings = None
        for number, value in enumerate(given):
            where = f"{name} {number}" + (f" ({value})" if isinstance(value, str | pathlib.Path) else "")
            if isinstance(value, Patches):
                found.append(_check_patches(value, tower, where, Modality.VIDEO if is_video else Modality.IMAGE))
                continue
            settings = settings or read_preprocessing(path, tower, is_video, per_frame and is_video)
            found.append(settings.video(value, where) if is_video else settings.picture(value, where))
    return found


def _check_patches(patches: Patches, tower: VisionTowerConfig, where: str, modality: Modality) -> Patches:
    need = (math.prod(patches.grid), tower.patch_features)
    shape = patches.patches_NX.shape
    require(shape == need, f"{where}: patches of shape {shape}; a grid of {patches.grid} needs {need}")
    sides = patches.grid[1] % tower.merge == 0 and patches.grid[2] % tower.merge == 0
    require(sides, f"{where}: a grid of {patches.grid}; its sides must be multiples of {tower.merge}")
    require(patches.modality is modality, f"{where} is of modality {patches.modality.name.lower()}")
    return patches


def read_preprocessing(
    folder: pathlib.Path, tower: VisionTowerConfig, videos: bool = False, per_frame: bool = False
) -> Preprocessing:
    """Reads a checkpoint's preprocessing settings.

    Args:
      tower: the tower that the patches must fit.
      videos: whether to read the settings of videos, not of pictures.
      per_frame: whether videos are read as Qwen2-VL reads them. If videos have no settings of their own, those of
        pictures are then used, with the sizes of Qwen3-Omni's processor.

    Raises:
      UserError: if there are no settings, they do not fit the tower, or they ask for something that is not supported.
    """
    hub = _settings(folder, videos, per_frame)
    hub.require_known(SETTINGS)
    for key in ("do_center_crop", "do_pad", "cap_pixels_per_frame"):
        hub.only(key, False)
    hub.only("num_frames")
    if videos and not per_frame:
        hub.only("do_sample_frames", True)
    names = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "merge"}
    for key, own in names.items():
        have, want = hub.whole(key), getattr(tower, own)
        require(have == want, f"{hub.where}: {key}={have}, but config.json's vision_config makes it {want}")
    size = hub.get("size", {})
    require(isinstance(size, Mapping), f"{hub.where}: size={shown(size)} must be an object")
    limits = HubConfig({**size, **_present(hub, ("min_pixels", "max_pixels"))}, f"{hub.where}: size")
    limits.require_known(("shortest_edge", "longest_edge", "min_pixels", "max_pixels"))
    least = limits.whole("min_pixels" if limits.get("min_pixels") is not None else "shortest_edge")
    most = limits.whole("max_pixels" if limits.get("max_pixels") is not None else "longest_edge")
    require(0 < least <= most, f"{hub.where}: size from {least} to {most} pixels is no range")
    resample = hub.whole("resample", 3)
    require(resample in _RESAMPLE, f"{hub.where}: resample={resample} is not supported, only 0 to 3")
    normalises = hub.flag("do_normalize", True)
    frames: dict[str, Any] = {}
    if videos:
        frames = {key: hub.whole(key, getattr(Preprocessing, key)) for key in ("min_frames", "max_frames")}
        frames["fps"] = hub.number("fps", Preprocessing.fps)
    return Preprocessing(
        tower=tower,
        least_pixels=least,
        most_pixels=most,
        resample=resample,
        resize=hub.flag("do_resize", True),
        scale=hub.number("rescale_factor", 1 / 255) if hub.flag("do_rescale", True) else 1.0,
        mean=_channels(hub, "image_mean", tower) if normalises else (0.0,) * tower.channels,
        std=_channels(hub, "image_std", tower) if normalises else (1.0,) * tower.channels,
        per_frame=per_frame,
        **frames,
    )


def _settings(folder: pathlib.Path, videos: bool, per_frame: bool) -> HubConfig:
    own, part = (VIDEOS, "video_processor") if videos else (IMAGES, "image_processor")
    for name in (own, BOTH):
        path = folder / name
        if not path.is_file():
            continue
        whole = HubConfig(parse_json_object(read_text(path, name), str(path)), str(path))
        if name == own:
            return whole
        if whole.get(part) is not None:
            return whole.part(part)
    if per_frame and (folder / IMAGES).is_file():
        shared = _settings(folder, videos=False, per_frame=False)
        others = {key: value for key, value in shared.values.items() if key not in ("min_pixels", "max_pixels")}
        return HubConfig({**others, "size": _OMNI_FRAME}, shared.where)
    raise UserError(f"{folder} holds neither {own} nor a {BOTH} with {part}; copy it from where the model is from")


def _present(hub: HubConfig, names: Sequence[str]) -> dict[str, Any]:
    return {name: hub.get(name) for name in names if hub.get(name) is not None}


def _channels(hub: HubConfig, key: str, tower: VisionTowerConfig) -> tuple[float, ...]:
    found = hub.get(key)
    numbers = isinstance(found, list) and all(isinstance(own, int | float) for own in found)
    fits = numbers and isinstance(found, list) and len(found) == tower.channels
    require(fits, f"{hub.where}: {key}={shown(found)} must be {comma_list([tower.channels])} numbers, one a channel")
    assert isinstance(found, list)
    return tuple(map(float, found))


def _resize(pixels_HW3: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    from PIL import Image

    if pixels_HW3.shape[:2] == size:
        return pixels_HW3
    return np.asarray(Image.fromarray(pixels_HW3).resize(size[::-1], resample=Image.Resampling(resample)))

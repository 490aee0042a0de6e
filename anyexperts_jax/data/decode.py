"""Decodes pictures, films and sounds from files, Pillow images, arrays or nested lists.

Numbers are interpreted by their type and range, and scaled or refused; nothing saturates, turns black or becomes NaN.
Every error is one line that names `where` the medium is: a path, or a row of a dataset.

| what | how it is read |
|---|---|
| uint8 | pixels as they are |
| bool, pictures of mode 1 | black and white |
| uint16, modes I;16* | 16-bit grey or colour: 65535 is white |
| mode I (int32) | in [0, 255] as it is, in [0, 65535] as 16-bit, else refused |
| other integers | pixels in [0, 255], else refused |
| floats, mode F | in [0, 1], where 1 is white; else in [0, 255]; else refused |
| palettes, CMYK, YCbCr, LAB, HSV | converted to RGB by Pillow |
| RGBA, LA, PA, a transparent colour | laid on white |
| EXIF orientation | applied |
| samples of a WAV file | by its type: integers over their full scale, uint8 silent at 128 |
| samples in int16, int8, uint8 | the same |
| samples in wider integers | of 16 bits if they fit; of 32 bits if they reach beyond 24; else refused |
| samples in floats | in [-1, 1]; peaks up to 2 are clipped, beyond that refused |
"""

import contextlib
import io
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.data.damage import DAMAGE, said
from anyexperts_jax.data.example import SAMPLE_RATE
from anyexperts_jax.data.sound_file import read_sound, resampled
from anyexperts_jax.data.video_file import read_timed_video, read_video

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FRAMES = 1024  # largest number of frames of an animated picture
_LOUDEST = 2.0  # float samples up to this are taken for peaks from a codec's rounding


def decode_picture(value: Any, where: str) -> UInt8[ndarray, "H W 3"]:
    """Returns the RGB pixels of a picture: the path or bytes of a file, a Pillow image, or numbers [H, W, 3].

    Raises:
      UserError: in one line with `where`, if it is not such a picture.
    """
    if isinstance(value, bytes | pathlib.Path):
        value = _open(value, "picture", where)
    if hasattr(value, "convert"):
        with _pillows_warnings():
            return _pixels_of(value, where)
    return _scaled(_numbers(value, where, "pixels"), 3, where)


def decode_video(value: Any, where: str) -> UInt8[ndarray, "F H W 3"]:
    """Returns the RGB pixels of a film: pictures of equal size, the path or bytes of a file, or numbers [F, H, W, 3].

    An animated GIF, PNG or WebP file gives all its frames; any other, as MP4 or WebM, those that are shown at times
    evenly spaced, by the extra `media`: see `data.video_file`.

    Raises:
      UserError: in one line with `where`, if it is not such a film.
    """
    if isinstance(value, bytes | pathlib.Path):
        data = _bytes(value, "film", where)
        if not _pillow_knows(data):
            return read_video(data, where)
        with _pillows_warnings():
            return _stacked(_frames_of(_open(data, "film", where), where), where)
    if isinstance(value, Sequence) and value and all(_is_picture(one) for one in value):
        return _stacked([decode_picture(one, f"{where}, frame {i}") for i, one in enumerate(value)], where)
    return _scaled(_numbers(value, where, "pixels"), 4, where)


def decode_film_file(file: bytes | pathlib.Path, where: str, most: int) -> tuple[UInt8[ndarray, "F H W 3"], float]:
    """Decodes a film's file; returns (frames as from `decode_video`, frames per second).

    Args:
      most: largest number of frames to take from a video file.

    Raises:
      UserError: in one line with `where`, if it is not a film, or does not say how long it lasts.
    """
    data = _bytes(file, "film", where)
    if not _pillow_knows(data):
        frames, seconds = read_timed_video(data, where, most)
    else:
        with _pillows_warnings():
            image = _open(data, "film", where)
            frames = _stacked(_frames_of(image, where), where)
            seconds = _shown_for(image, len(frames)) / 1000
    require(seconds > 0, f"the film in {where} does not say how long its frames are shown; give them and their fps")
    return frames, len(frames) / seconds


def decode_audio(value: Any, where: str, rate: int | None = None) -> Float32[ndarray, " samples"]:
    """Returns mono samples in [-1, 1] at SAMPLE_RATE, from numbers, or from a file's path or bytes, resampled.

    Other formats than WAV, and other rates, need the extra `media`: see `data.sound_file`.

    Args:
      rate: the rate of numbers, which must be SAMPLE_RATE; None: it is assumed.

    Raises:
      UserError: in one line with `where`, if it is not such a sound.
    """
    if isinstance(value, bytes | pathlib.Path):
        return _sound_of_file(value, where)
    require(rate in (None, SAMPLE_RATE), f"{where}: audio at {rate} Hz must be resampled to {SAMPLE_RATE} Hz")
    samples = _numbers(value, where, "audio")
    require(samples.ndim == 1, f"{where}: audio of shape {samples.shape} must be mono")
    require(samples.size > 0, f"{where}: the audio is empty")
    return _full_scale(_in_own_range(samples, where), where).astype(np.float32)


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes | pathlib.Path) or hasattr(value, "convert")


@contextlib.contextmanager
def _pillows_warnings() -> Iterator[None]:
    """Turns Pillow's warnings about large pictures into errors, and ignores those about metadata."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _open(file: bytes | pathlib.Path, kind: str, where: str) -> "Image":
    """Opens a file as a Pillow image, with its first frame decoded."""
    from PIL import Image

    data = _bytes(file, kind, where)
    try:
        with _pillows_warnings():
            image = Image.open(io.BytesIO(data))
            image.load()
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise UserError(f"the {kind} in {where} has more than {most} pixels; scale it down") from error
    except DAMAGE as error:
        advice = "; it must be an animated GIF, PNG or WebP file, or frames" if kind == "film" else ""
        raise UserError(f"cannot read the {kind} in {where}: {said(error)}{advice}") from error


def _pillow_knows(data: bytes) -> bool:
    """Whether the file's first bytes are those of a picture, complete or not."""
    from PIL import Image, UnidentifiedImageError

    try:
        with _pillows_warnings(), Image.open(io.BytesIO(data)):
            return True
    except UnidentifiedImageError:
        return False
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, *DAMAGE):
        return True


def _bytes(file: bytes | pathlib.Path, kind: str, where: str) -> bytes:
    try:
        return file if isinstance(file, bytes) else file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {kind} in {where}: {said(error)}") from error


def _frames_of(image: "Image", where: str) -> list[UInt8[ndarray, "H W 3"]]:
    """Returns all frames of an animated picture, without counting them first, which may take longer than reading."""
    from PIL import Image

    most = Image.MAX_IMAGE_PIXELS
    frames: list[np.ndarray] = []
    while True:
        try:
            image.seek(len(frames))
            image.load()
        except EOFError:
            return frames
        except DAMAGE as error:
            raise UserError(f"cannot read the film in {where}, frame {len(frames)}: {said(error)}") from error
        frames.append(_pixels_of(image, where))
        require(len(frames) <= MAX_FRAMES, f"the film in {where} has more than {MAX_FRAMES} frames; take some out")
        pixels = len(frames) * image.width * image.height
        require(most is None or pixels <= most, f"the film in {where} has more than {most:,} pixels; scale it down")


def _shown_for(image: "Image", frames: int) -> float:
    """Returns the total duration of an animated picture in milliseconds; 0 if it does not say."""
    total = 0.0
    for number in range(frames):
        image.seek(number)
        total += float(image.info.get("duration", 0))
    return total


def _stacked(frames: list[np.ndarray], where: str) -> UInt8[ndarray, "F H W 3"]:
    sizes = {f"{frame.shape[1]} x {frame.shape[0]}" for frame in frames}
    require(len(sizes) == 1, f"{where}: frames of one film differ in size: {', '.join(sorted(sizes))} pixels")
    return np.stack(frames)


def _pixels_of(image: "Image", where: str) -> UInt8[ndarray, "H W 3"]:
    """Returns the RGB pixels of a Pillow image, according to its mode."""
    try:
        values = _values_of(image)
    except DAMAGE as error:
        raise UserError(f"cannot read the picture in {where}: {said(error)}") from error
    return _scaled(values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=-1), 3, where)


def _values_of(image: "Image") -> np.ndarray:
    """Returns RGB pixels, or for more than 8 bits grey ones [H, W] in a type that tells their range."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":
        values = np.asarray(image)
        is_16_bit = values.size > 0 and values.min() >= 0 and 255 < values.max() <= 65535
        return values.astype(np.uint16) if is_16_bit else values
    if image.mode == "F":
        return np.asarray(image)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return np.asarray(image.convert("RGB"))


def _scaled(pixels: np.ndarray, axes: int, where: str) -> np.ndarray:
    """Converts pixels of any type to bytes, by the table in the module's docstring."""
    shaped = pixels.ndim == axes and pixels.shape[-1] == 3
    require(shaped, f"{where}: pixels of shape {pixels.shape} must have {axes} axes, the last of size 3")
    require(pixels.size > 0, f"{where}: there are no pixels in shape {pixels.shape}")
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return np.rint(pixels / 257).astype(np.uint8)
    _require_finite(pixels, where, "pixels")
    low, high = pixels.min().item(), pixels.max().item()
    span = f"these are from {low:g} to {high:g}"
    if pixels.dtype.kind == "f":
        require(low >= 0 and high <= 255, f"{where}: pixels in floats must be in [0, 1] or [0, 255]; {span}")
        return np.rint(pixels * (255 if high <= 1 else 1)).astype(np.uint8)
    require(low >= 0 and high <= 255, f"{where}: pixels must be in [0, 255]; {span}")
    return pixels.astype(np.uint8)


def _numbers(value: Any, where: str, what: str) -> np.ndarray:
    """Returns an array of numbers or booleans."""
    try:
        values = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: {what} must be numbers of one shape: {said(error)}") from error
    if values.dtype == object and all(one is None or isinstance(one, int | float) for one in values.flat):
        values = values.astype(np.float64)  # None becomes NaN, which is refused as such
    kinds = "biuf" if what == "pixels" else "iuf"
    require(values.dtype.kind in kinds or values.size == 0, f"{where}: {what} must be numbers, not {values.dtype}")
    return values


def _require_finite(values: np.ndarray, where: str, what: str) -> None:
    if values.dtype.kind != "f":
        return
    bad = int((~np.isfinite(values)).sum())
    require(bad == 0, f"{where}: {what} must be finite; {bad} of {values.size} are missing, NaN or infinite")


def _full_scale(samples: np.ndarray, where: str) -> np.ndarray:
    """Scales samples by the full scale of their type to [-1, 1]."""
    _require_finite(samples, where, "samples")
    if samples.dtype == np.uint8:
        return (samples - 128.0) / 128
    if samples.dtype.kind == "i":
        scaled: np.ndarray = samples.astype(np.float32 if samples.dtype.itemsize <= 2 else np.float64)  # exact
        return scaled / -float(np.iinfo(samples.dtype).min)
    require(samples.dtype.kind == "f", f"{where}: samples in {samples.dtype} have no known full scale; give floats")
    loudest = float(np.abs(samples).max())
    allowed = f"floats in [-1, 1], or integers of 16 or 32 bits; these reach {loudest:g}"
    require(loudest <= _LOUDEST, f"{where}: samples must be {allowed}")
    return samples.clip(-1, 1)


def _in_own_range(samples: np.ndarray, where: str) -> np.ndarray:
    """Casts wide integers, which nested lists become, to the type whose range their values need."""
    if samples.dtype.kind != "i" or samples.dtype.itemsize <= 2:
        return samples
    low, high = int(samples.min()), int(samples.max())
    if low >= -(2**15) and high < 2**15:
        return samples.astype(np.int16)
    loudest = max(-low, high)
    known = f"samples that reach {loudest:,} may be of 24 or of 32 bits; give them as floats in [-1, 1]"
    require(loudest > 2**23 and low >= -(2**31) and high < 2**31, f"{where}: {known}")
    return samples.astype(np.int32)


def _sound_of_file(file: bytes | pathlib.Path, where: str) -> Float32[ndarray, " samples"]:
    rate, samples = read_sound(file, where)
    scaled = _full_scale(samples, where)
    mono = scaled if scaled.ndim == 1 else scaled.mean(axis=1)
    return resampled(mono, rate, where).clip(-1, 1).astype(np.float32)

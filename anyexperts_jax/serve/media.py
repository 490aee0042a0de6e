"""Reads the pictures, videos and sounds of a request, given as data URLs and base64, with `data.decode`."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from anyexperts_jax.core.errors import UserError, comma_list, require, shown
from anyexperts_jax.data.decode import decode_audio, decode_picture
from anyexperts_jax.pretrained.pictures import Video

_DATA_URL = re.compile(r"data:(image|video)/([\w.+-]+);base64,", re.ASCII)
_KINDS = {"image_url": "image", "video_url": "video", "input_audio": "audio"}
_FRAMES = ("jpeg", "png", "webp")  # of data:video/jpeg;base64,FRAME,FRAME: pictures between commas
FPS = 2.0  # of frames that come without it
_SAID = {"image": "picture", "video": "video"}


def part_of(part: Any, where: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Reads the picture, video or sound of one part of a message's content.

    Args:
      where: the part's place in the request, for error messages.
      kinds: the media that the model reads, of "image", "video" and "audio".

    Returns:
      A part that holds the medium itself: {"type": "image", "image": pixels}. A `Video` is decoded by the model that
      reads it, which knows how many frames it takes.

    Raises:
      UserError: for another kind, a URL that is not a data URL, or data that cannot be decoded.
    """
    name = part.get("type") if isinstance(part, Mapping) else None
    require(name != "text", f"{where}: a part of type 'text' needs its text, as a string")
    readable = comma_list(["text", *(name for name, kind in _KINDS.items() if kind in kinds)])
    kind = _KINDS.get(name) if isinstance(name, str) else None
    require(kind in kinds, f"{where}: type={shown(name)}; this model reads {readable}")
    if kind == "image":
        return {"type": kind, kind: decode_picture(_bytes(_data(part, "image_url", where)[1], where), where)}
    if kind == "video":
        return {"type": kind, kind: _video(part, where)}
    return {"type": "audio", "audio": decode_audio(_bytes(_field(part, "input_audio", "data", where), where), where)}


def _video(part: Mapping[str, Any], where: str) -> Video:
    """Reads a video: a file, or frames as base64 between commas, with `fps` beside the URL."""
    form, data = _data(part, "video_url", where)
    fps = part["video_url"].get("fps")
    if form not in _FRAMES:
        require(fps is None, f"{where}: fps={shown(fps)} of a video in a file: leave it out, the file says it")
        return Video(_bytes(data, where))
    number = isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps <= 1e30
    require(fps is None or number, f"{where}: fps={shown(fps)} of a video must be a number > 0")
    frames = [_bytes(frame, f"{where}, frame {i}") for i, frame in enumerate(data.split(","))]
    return Video(frames, FPS if fps is None else fps)


def _data(part: Mapping[str, Any], outer: str, where: str) -> tuple[str, str]:
    """Returns the form and the base64 data of a data URL."""
    kind = outer.removesuffix("_url")
    url = _field(part, outer, "url", where)
    head = _DATA_URL.match(url)
    valid = head is not None and (kind == "video" or head[1] == "image")
    example = f"data:{kind}/{'png' if kind == 'image' else 'mp4'};base64,..."
    require(valid, f"{where}: the server fetches nothing; give the {_SAID[kind]} as a data URL, {example}")
    assert head is not None
    return (head[2] if head[1] == "video" else ""), url[head.end() :]


def _field(part: Mapping[str, Any], outer: str, inner: str, where: str) -> str:
    held = part.get(outer)
    value = held.get(inner) if isinstance(held, Mapping) else None
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {outer} must be an object with the text {inner}")
    return value


def _bytes(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: the data is not base64: {error}") from error

"""Decodes the pictures and sounds of a request, given as data URLs and base64, with `data.decode`."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from anyexperts_jax.core.errors import UserError, comma_list, require, shown
from anyexperts_jax.data.conversation import Medium
from anyexperts_jax.data.decode import decode_audio, decode_picture

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


def medium_of(part: Any, where: str, kinds: Sequence[str]) -> Medium:
    """Decodes the picture or sound of one part of a message's content.

    Args:
      where: the part's place in the request, for error messages.
      kinds: the media that the model reads, of "image" and "audio".

    Raises:
      UserError: for another kind, a URL that is not a data URL, or data that cannot be decoded.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    require(kind != "text", f"{where}: a part of type 'text' needs its text, as a string")
    known = {"image_url": "image", "input_audio": "audio"}
    readable = comma_list(["text", *(name for name, medium in known.items() if medium in kinds)])
    require(
        isinstance(kind, str) and known.get(kind) in kinds, f"{where}: type={shown(kind)}; this model reads {readable}"
    )
    if kind == "image_url":
        url = _field(part, "image_url", "url", where)
        head = _DATA_URL.match(url)
        require(
            head is not None,
            f"{where}: the server fetches nothing; give the picture as a data URL, data:image/png;base64,...",
        )
        assert head is not None
        return Medium("image", decode_picture(_bytes(url[head.end() :], where), where))
    return Medium("audio", decode_audio(_bytes(_field(part, "input_audio", "data", where), where), where))


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

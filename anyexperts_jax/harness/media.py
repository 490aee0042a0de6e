"""Conversations of lmms-eval's tasks in the form that readers of prompts take."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import require, shown
from anyexperts_jax.data.sound_file import resampled
from anyexperts_jax.pretrained.pictures import Video

_CUTS = ("start_time", "end_time", "video_start", "video_end")  # of a part of a video


def conversation_of(messages: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """Returns messages whose parts hold their media. Text alone becomes a string: some templates know nothing else.

    Args:
      messages: with lists of parts, {"type": "text", "text": ...} or {"type": "image", "url": a Pillow image or path}.
      where: the task's document, for error messages.

    Raises:
      UserError: for a part that is not read.
    """
    found = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [
            _part(part, where) for part in content
        ]  # fmt: skip
        plain = all(part["type"] == "text" for part in parts)
        text = "".join(part["text"] for part in parts) if plain else None
        found.append({"role": message["role"], "content": parts if text is None else text})
    return found


def _part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    value = part.get("url")
    if isinstance(value, Mapping) and "array" in value:
        kind = "audio"  # lmms-eval takes every dictionary for a video
    require(kind in ("image", "audio", "video"), f"{where}: a part of type {shown(kind)}; text, image, audio and video")
    cut = any(part.get(name) is not None or (isinstance(value, Mapping) and name in value) for name in _CUTS)
    require(not cut, f"{where}: a cut of a video, which is not read; only whole files are")
    path = isinstance(value, str | pathlib.Path)
    if kind == "image":
        return {"type": kind, kind: value}
    if kind == "video":
        require(path, f"{where}: a video as {type(value).__name__}; only the path of a file is read")
        return {"type": kind, kind: Video(str(value))}
    if path:
        return {"type": "audio", "audio": str(value)}
    sound = isinstance(value, Mapping) and "array" in value and "sampling_rate" in value
    require(sound, f"{where}: a sound as {type(value).__name__}; a path, or array and sampling_rate, is read")
    assert isinstance(value, Mapping)
    samples = np.asarray(value["array"], np.float32)
    mono = samples if samples.ndim == 1 else samples.mean(axis=int(np.argmin(samples.shape)))
    return {"type": "audio", "audio": resampled(mono, int(value["sampling_rate"]), where)}

"""Reads video files with PyAV (extra `media`): the frames shown at evenly spaced times, whatever the frame rate."""

import io
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.data.damage import MEDIA_EXTRA, said

if TYPE_CHECKING:
    from av import VideoFrame

MAX_FRAMES = 64  # largest number of frames taken from a file; a run takes at most `encoding.max_video_frames` of them
_KINDS = "it must be an animated GIF, PNG or WebP file, frames, or a video that PyAV reads: MP4, WebM, MOV, AVI"


def read_video(data: bytes, where: str, most: int = MAX_FRAMES) -> UInt8[ndarray, "F H W 3"]:
    """Returns the frames of `read_timed_video`."""
    return read_timed_video(data, where, most)[0]


def read_timed_video(data: bytes, where: str, most: int) -> tuple[UInt8[ndarray, "F H W 3"], float]:
    """Reads a video file; returns (RGB frames, rotated as the file says, duration in seconds).

    Its time from the first frame to the end of the last is cut into F equal stretches, and each gives the frame that
    is on the screen in its middle. F is the number of its frames, or `most`, or as many as have the pixels that Pillow
    allows a picture to have.

    Raises:
      UserError: in one line with `where`, for what is no video, holds none or no frame, was cut short, or needs PyAV.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"cannot read the film in {where}: {_KINDS}, which needs {MEDIA_EXTRA}") from error
    try:
        begin, end, count = _length(data, where, most)
        times_F = begin + (np.arange(count) + 0.5) * (end - begin) / count
        return _shown(data, where, times_F), end - begin
    except UserError:
        raise
    except (av.error.FFmpegError, ValueError, MemoryError) as error:
        raise UserError(f"cannot read the film in {where}: {said(error)}; {_KINDS}") from error


def _length(data: bytes, where: str, most: int) -> tuple[float, float, int]:
    """Returns (begin and end in seconds, number of frames to take), without decoding anything."""
    import av
    from PIL import Image

    with av.open(io.BytesIO(data), "r") as file:
        require(len(file.streams.video) > 0, f"the film in {where} holds no video, or was cut short; {_KINDS}")
        stream = file.streams.video[0]
        packets = [(packet.pts, packet.duration or 0) for packet in file.demux(stream) if packet.size]
        shown = sorted((start, lasts) for start, lasts in packets if start is not None)
        promised = stream.frames if "mp4" in file.format.name else 0  # other formats count ticks, or nothing
        second = float(stream.time_base or 1)
        area, pixels = stream.codec_context.width * stream.codec_context.height, Image.MAX_IMAGE_PIXELS
    cut = f"cannot read the film in {where}: it was cut short, {len(shown)} frames of {promised}; {_KINDS}"
    require(len(shown) >= promised, cut)
    require(len(shown) > 0, f"the film in {where} has no frames; {_KINDS}")
    if pixels is not None and area > 0:
        require(area <= pixels, f"the film in {where} has frames of more than {pixels:,} pixels; scale it down")
        most = min(most, pixels // area)
    starts = [start for start, _ in shown]
    usual = float(np.median(np.diff(starts))) if len(starts) > 1 else 1.0
    lasts = max(shown[-1][1], usual)  # AVI files give one tick as the duration of a frame
    return starts[0] * second, (starts[-1] + lasts) * second, min(len(shown), most)


def _shown(data: bytes, where: str, times_F: Float[ndarray, " F"]) -> UInt8[ndarray, "F H W 3"]:
    """Yields the frame on the screen at each time: the last one that began before it."""
    import av

    found: list[np.ndarray] = []
    shown: VideoFrame | None = None
    with av.open(io.BytesIO(data), "r") as file:
        for frame in file.decode(video=0):
            while shown is not None and len(found) < len(times_F) and frame.time > times_F[len(found)]:
                found.append(_pixels(shown))
            if len(found) == len(times_F):
                break
            shown = frame
    if shown is None:
        raise UserError(f"the film in {where} has no frames; {_KINDS}")
    found += [_pixels(shown)] * (len(times_F) - len(found))
    sizes = {frame.shape for frame in found}
    require(len(sizes) == 1, f"the film in {where} changes its size in the middle; give one of one size")
    return np.stack(found)


def _pixels(frame: "VideoFrame") -> UInt8[ndarray, "H W 3"]:
    """Returns the frame as RGB, rotated by the file's quarter turns."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)

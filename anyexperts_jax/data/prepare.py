"""Prepares pictures and videos before they are cut into patches. Everything that shows the model a picture uses it.

Training, evaluation, generation and the report call `prepare`, and `encoding.pictures` of the run's configuration says
what it does. "fit" resizes pictures that are not whole patches, or have too many, no more than needed. "whole" refuses
them. A picture of whole patches, and few enough, like those of the generated domains, stays unchanged in both cases.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import require
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.example import Example


def prepare(example: Example, spec: EncodingSpec) -> Example:
    """Returns the example with its picture or video, and their evidence, as a run of `spec` sees them.

    Raises:
      UserError: if the run reads no pictures; with `spec.pictures="whole"` also if the sides are not whole patches, or
        there are more patches or frames than a sequence holds.
    """
    pixels = example.video if example.video is not None else example.image
    if pixels is None:
        return example
    where = f"{example.domain} {example.media} of {pixels.shape[-2]} x {pixels.shape[-3]} pixels"
    require(spec.max_patches > 0, f"{where}: this run reads no images: data.encoding.max_patches=0")
    if spec.pictures == "whole":
        _require_whole(pixels if pixels.ndim == 4 else pixels[None], spec, where)
        return example
    if example.video is not None:
        video, marks = _fit_video(example.video, example.video_evidence, spec)
        return dataclasses.replace(example, video=video, video_evidence=marks)
    grid = patch_grid(pixels.shape[0], pixels.shape[1], spec.patch_size, spec.max_patches)
    if pixels.shape[:2] == tuple(side * spec.patch_size for side in grid):
        return example
    evidence = None if example.image_evidence is None else example.image_evidence[None]
    frames, marks = _resized(pixels[None], evidence, grid, spec.patch_size)
    return dataclasses.replace(example, image=frames[0], image_evidence=None if marks is None else marks[0])


def patch_grid(height: int, width: int, patch_size: int, most: int) -> tuple[int, int]:
    """Returns (rows, columns) of patches for a picture: at least one patch and at most `most`.

    The picture is scaled by the largest factor up to 1 at which its sides, rounded to whole patches, have no more than
    `most`. So a side changes by at most half a patch if the picture fits; otherwise the ratio of width and height is
    kept, up to this rounding.
    """
    rows = columns = 1
    while True:
        # The scales at which a side reaches its next half patch, as fractions of (2 * height * width).
        next_row, next_column = (2 * rows + 1) * patch_size * width, (2 * columns + 1) * patch_size * height
        scale = min(next_row, next_column)
        wider = (rows + (next_row == scale), columns + (next_column == scale))
        if scale > 2 * height * width or wider[0] * wider[1] > most:
            return rows, columns
        rows, columns = wider


def _fit_video(
    frames_FHW3: UInt8[ndarray, "F H W 3"], evidence_FHW: Bool[ndarray, "F H W"] | None, spec: EncodingSpec
) -> tuple[np.ndarray, np.ndarray | None]:
    """Takes as many evenly spaced frames as a sequence holds, and resizes them to one grid."""
    frames, height, width, _ = frames_FHW3.shape
    kept = min(frames, spec.max_video_frames, spec.max_patches)
    if kept < frames:
        picked = (2 * np.arange(kept) + 1) * frames // (2 * kept)  # the middles of `kept` equal intervals
        frames_FHW3 = frames_FHW3[picked]
        evidence_FHW = None if evidence_FHW is None else evidence_FHW[picked]
    grid = patch_grid(height, width, spec.patch_size, spec.max_patches // kept)
    return _resized(frames_FHW3, evidence_FHW, grid, spec.patch_size)


def _resized(
    frames_FHW3: np.ndarray, evidence_FHW: np.ndarray | None, grid: tuple[int, int], patch_size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Resizes frames and evidence to the grid; returns the same arrays if they have its size."""
    from PIL import Image

    height, width = (side * patch_size for side in grid)
    if frames_FHW3.shape[1:3] == (height, width):
        return frames_FHW3, evidence_FHW
    size, bicubic, area = (width, height), Image.Resampling.BICUBIC, Image.Resampling.BOX
    frames = np.stack([np.asarray(Image.fromarray(frame).resize(size, bicubic)) for frame in frames_FHW3])
    if evidence_FHW is None:
        return frames, None
    shares = [np.asarray(Image.fromarray(marks.astype(np.float32)).resize(size, area)) for marks in evidence_FHW]
    return frames, np.stack(shares) >= 0.5


def _require_whole(frames_FHW3: np.ndarray, spec: EncodingSpec, where: str) -> None:
    frames, height, width, _ = frames_FHW3.shape
    size = spec.patch_size
    require(
        height % size == 0 and width % size == 0, f"{where} does not divide into patches of encoding.patch_size={size}"
    )
    count = frames * (height // size) * (width // size)
    require(
        count <= spec.max_patches, f"{where} makes {count} patches, more than encoding.max_patches={spec.max_patches}"
    )
    require(
        frames <= spec.max_video_frames,
        f"{where} has {frames} frames, more than encoding.max_video_frames={spec.max_video_frames}",
    )

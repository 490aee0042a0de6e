"""The media panels of an importance map: picture, spectrogram, film strip."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from anyexperts_jax.data.example import SAMPLE_RATE
from anyexperts_jax.report import style
from anyexperts_jax.report.example_map import ExampleMap
from anyexperts_jax.report.style import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Box = tuple[float, float, float, float]  # left, bottom, width, height as fractions of the figure
_LAYER_PANELS = 3  # number of layers with a panel of their own, evenly spaced from the first to the last
_COLOURED = 0.6  # opacity of the colours over a picture


def scale_of(values: Sequence[ndarray]) -> Scale:
    """The scale of a panel: the middle 96% of the values of all its examples, so that no outlier decides it."""
    low, high = np.nanquantile(np.concatenate([v.ravel() for v in values]), (0.02, 0.98))
    return Scale.between(float(low), float(high))


def _mean_scale(maps: Sequence[ExampleMap]) -> Scale:
    return scale_of([one.media_L.mean(axis=0) for one in maps])


def _note(axes: "Axes", text: str) -> None:
    axes.set_title(text, fontsize=8, weight="normal", color=style.FAINT, pad=3)


# Picture


def draw_image(drawn: "Figure", box: Box, one: ExampleMap, maps: Sequence[ExampleMap]) -> None:
    """Draws the picture, the mean over layers on top of it, and single layers."""
    image, evidence, patches_LFRC = one.example.image, one.example.image_evidence, one.patches_LFRC
    assert image is not None
    assert patches_LFRC is not None
    mean_RC = patches_LFRC[:, 0].mean(axis=0)
    panels: list[tuple[str, ndarray | None, Scale | None]] = [
        ("picture", None, None),
        ("mean of layers", mean_RC, _mean_scale(maps)),
        *(
            (f"MoE layer {layer}", patches_LFRC[layer, 0], scale_of([other.media_L[layer] for other in maps]))
            for layer in _layers_drawn(len(patches_LFRC))
        ),
    ]
    left, bottom, width, height = box
    step = 0.96 * width / len(panels)
    for i, (title, heat_RC, scale) in enumerate(panels):
        axes = drawn.add_axes((left + 0.02 * width + i * step, bottom, 0.96 * step, height * 0.82), anchor="S")
        _paint_frame(axes, image, evidence, heat_RC, patch_size=one.patch_size, scale=scale)
        text = title if scale is None else f"{title}\nimportance {scale}"
        axes.set_title(text, fontsize=8, weight="bold" if i == 1 else "normal", loc="center")


def _layers_drawn(num_layers: int) -> list[int]:
    return sorted(set(np.linspace(0, num_layers - 1, min(num_layers, _LAYER_PANELS)).round().astype(int).tolist()))


def _paint_frame(
    axes: "Axes",
    pixels_HW3: ndarray,
    evidence_HW: Bool[ndarray, "H W"] | None,
    heat_RC: Float[ndarray, "rows cols"] | None,
    patch_size: int,
    scale: Scale | None,
) -> None:
    """Draws a frame, or with `heat_RC` its grey image under coloured patches. Evidence is always outlined."""
    height, width = pixels_HW3.shape[:2]
    if heat_RC is None or scale is None:
        axes.imshow(pixels_HW3, interpolation="nearest")
    else:
        axes.imshow(pixels_HW3.mean(axis=-1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        rows, columns = heat_RC.shape
        extent = (-0.5, columns * patch_size - 0.5, rows * patch_size - 0.5, -0.5)
        axes.imshow(scale.colours(heat_RC), alpha=_COLOURED, extent=extent, interpolation="nearest")
    if evidence_HW is not None and evidence_HW.any():
        padded = np.pad(evidence_HW.astype(float), 1)
        x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
        axes.contour(x, y, padded, [0.5], colors=style.EVIDENCE, linewidths=1.6)
    axes.set_xlim(-1, width)
    axes.set_ylim(height, -1)
    axes.set_aspect("equal")
    style.bare(axes)


# Bars, over the spectrogram and the film strip


def _draw_bars(axes: "Axes", values: ndarray, scale: Scale, starts: ndarray, step: float, marked: ndarray) -> None:
    """Draws a coloured bar per value, from slightly below the scale's lower end. Marked bars are outlined."""
    floor = scale.low - 0.12 * (scale.high - scale.low)
    heights = np.clip(values, scale.low, scale.high) - floor
    edges = [style.EVIDENCE if mark else "none" for mark in marked.tolist()]
    axes.bar(
        starts,
        heights,
        step * 0.92,
        bottom=floor,
        align="edge",
        color=scale.colours(values).tolist(),
        edgecolor=edges,
        linewidth=2.0,
    )
    axes.set_ylim(floor, scale.high + 0.06 * (scale.high - floor))
    axes.set_yticks([scale.low, scale.high], [f"{scale.low:.2f}", f"{scale.high:.2f}"])
    axes.set_ylabel("importance", fontsize=8, labelpad=1)
    axes.tick_params(axis="x", length=0, labelbottom=False)


# Sound


def draw_audio(drawn: "Figure", box: Box, one: ExampleMap, maps: Sequence[ExampleMap]) -> None:
    """Draws a bar of importance per chunk above the spectrogram, which has the same colours; evidence is outlined."""
    from matplotlib.patches import Rectangle

    audio = one.example.audio
    assert audio is not None
    assert one.chunks_LS is not None
    left, bottom, width, height = box
    bars = drawn.add_axes((left + 0.08 * width, bottom + 0.68 * height, 0.89 * width, 0.23 * height))
    picture = drawn.add_axes((left + 0.08 * width, bottom + 0.15 * height, 0.89 * width, 0.49 * height), sharex=bars)
    scale, value_S = _mean_scale(maps), one.chunks_LS.mean(axis=0)
    starts = np.arange(len(value_S)) * one.chunk_seconds
    _draw_bars(bars, value_S, scale, starts, step=one.chunk_seconds, marked=np.zeros(len(value_S), bool))
    _note(bars, f"mean of layers, one bar per token of {1000 * one.chunk_seconds:.0f} ms, importance {scale}")

    seconds, top = len(audio) / SAMPLE_RATE, SAMPLE_RATE / 2000
    picture.imshow(_spectrogram(audio), aspect="auto", origin="lower", cmap="gray_r", extent=(0, seconds, 0, top))
    for start, colour in zip(starts, scale.colours(value_S), strict=True):
        picture.axvspan(start, start + one.chunk_seconds, color=colour, alpha=0.42, linewidth=0)
    for start, end in one.example.audio_evidence:
        outline = Rectangle((start, 0), end - start, top, fill=False, edgecolor=style.EVIDENCE, lw=2.0, clip_on=False)
        picture.add_patch(outline)
    picture.set_xlim(0, max(seconds, len(value_S) * one.chunk_seconds))
    picture.set_xlabel("seconds", labelpad=1, fontsize=8)
    picture.set_ylabel("kHz", fontsize=8)


def _spectrogram(audio: Float[ndarray, " samples"]) -> Float[ndarray, "frequencies frames"]:
    """Decibels relative to the maximum, at least -60, of 25 ms windows every 10 ms, up to half the sample rate."""
    from scipy.signal import ShortTimeFFT
    from scipy.signal.windows import hann

    step, window = SAMPLE_RATE // 100, SAMPLE_RATE // 40
    padded = np.pad(audio.astype(np.float64), (0, max(0, 2 * window - len(audio))))
    power = ShortTimeFFT(hann(window), step, SAMPLE_RATE).spectrogram(padded)
    return np.asarray(10 * np.log10(power / max(power.max(), 1e-12) + 1e-6))


# Film strip


def draw_video(drawn: "Figure", box: Box, one: ExampleMap, maps: Sequence[ExampleMap]) -> None:
    """Draws a bar per frame (the mean importance of its patches) above the frames, plain and with coloured patches."""
    video, evidence, patches_LFRC = one.example.video, one.example.video_evidence, one.patches_LFRC
    assert video is not None
    assert patches_LFRC is not None
    left, bottom, width, height = box
    frames = len(video)
    scale, bar_scale = _mean_scale(maps), scale_of([_frame_means(other) for other in maps])
    marked_F = np.zeros(frames, bool) if evidence is None else np.asarray(evidence.any(axis=(1, 2)))
    bars = drawn.add_axes((left + 0.08 * width, bottom + 0.7 * height, 0.89 * width, 0.22 * height))
    _draw_bars(bars, _frame_means(one), bar_scale, np.arange(frames) + 0.04, step=1.0, marked=marked_F)
    bars.set_xlim(0, frames)
    bars.set_xticks([])
    _note(bars, f"mean of layers, one bar per frame, importance {bar_scale}; on the patches, {scale}")
    for frame in range(frames):
        marks = None if evidence is None else evidence[frame]
        x = left + (0.08 + 0.89 * (frame + 0.04) / frames) * width
        for row, heat_RC in enumerate((patches_LFRC[:, frame].mean(axis=0), None)):
            place = (x, bottom + (0.01 + 0.34 * row) * height, 0.89 * 0.92 / frames * width, 0.32 * height)
            _paint_frame(drawn.add_axes(place), video[frame], marks, heat_RC, patch_size=one.patch_size, scale=scale)


def _frame_means(one: ExampleMap) -> Float[ndarray, " F"]:
    assert one.patches_LFRC is not None
    return np.asarray(np.nanmean(one.patches_LFRC, axis=(0, 2, 3)))

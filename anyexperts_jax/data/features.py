"""The audio front end: log-mel frames, and chunks of stacked frames, each of which becomes one token.

Frame i covers samples [HOP * i, HOP * i + WINDOW) of the audio. There is no padding, and no frame past the end, but
audio shorter than one window is padded with silence to one.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64
from numpy import ndarray
from scipy.sparse import csr_array

from anyexperts_jax.core.errors import require
from anyexperts_jax.data.example import SAMPLE_RATE

WINDOW = 400  # samples, 25 ms
HOP = 160  # samples, 10 ms
FFT_SIZE = 512
LOW_HZ = 60.0
HIGH_HZ = 7600.0

_POWER_FLOOR = 1e-6  # below the dither of the quietest example, so digital silence is not an outlier
_LOG_MEAN = -0.6  # roughly the mean and deviation of log10 power over the speech domain's training split
_LOG_DEVIATION = 1.4


def hz_to_mel(hz: float) -> float:
    """Converts hertz to mels by the HTK formula, 2595 log10(1 + f / 700)."""
    return 2595.0 * math.log10(1.0 + hz / 700.0)


def mel_to_hz(mel: Float64[ndarray, " ..."]) -> Float64[ndarray, " ..."]:
    """The inverse of `hz_to_mel`."""
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


@functools.cache
def mel_filters(num_bands: int) -> Float64[ndarray, "bins bands"]:
    """Returns triangular filters of height 1 on the FFT's bins, with corners equally spaced in mels.

    Raises:
      UserError: if a band is so narrow that it contains no bin.
    """
    require(num_bands >= 1, f"num_bands={num_bands} must be >= 1")
    corners_hz = mel_to_hz(np.linspace(hz_to_mel(LOW_HZ), hz_to_mel(HIGH_HZ), num_bands + 2))
    bins_hz = np.arange(FFT_SIZE // 2 + 1)[:, None] * SAMPLE_RATE / FFT_SIZE
    low, centre, high = corners_hz[:-2], corners_hz[1:-1], corners_hz[2:]
    filters = np.maximum(0.0, np.minimum((bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)))
    require(bool((filters > 0).any(axis=0).all()), f"num_bands={num_bands} leaves a band without a bin; lower it")
    filters.flags.writeable = False
    return filters


@functools.cache
def _sparse_filters(num_bands: int) -> csr_array:
    """Returns `mel_filters` as a sparse matrix, with a row per band.

    Nine in ten weights are zero. A dense product would use BLAS, whose threads compete with the training step's for
    the cores (six times slower on two), and whose rounding differs between builds.
    """
    return csr_array(mel_filters(num_bands).T)


def num_frames(num_samples: int) -> int:
    """Returns how many frames `log_mel` makes of that many samples; at least one."""
    return 1 + max(0, num_samples - WINDOW) // HOP


def log_mel(audio: Float32[ndarray, " samples"], num_bands: int = 32) -> Float32[ndarray, "frames bands"]:
    """Computes the log10 mel power of each frame, normalised by constants to about zero mean and unit deviation.

    Audio is mono at SAMPLE_RATE, in [-1, 1]. Periodic Hann window, 512-point FFT.
    """
    frames = num_frames(len(audio))
    needed = WINDOW + HOP * (frames - 1)
    padded = np.zeros(max(needed, len(audio)))
    padded[: len(audio)] = audio
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: needed - WINDOW + 1 : HOP]
    spectrum = np.fft.rfft(windows * _hann(), n=FFT_SIZE)
    power = spectrum.real**2 + spectrum.imag**2
    log_power = np.log10(np.maximum(_sparse_filters(num_bands).dot(power.T).T, _POWER_FLOOR))
    return ((log_power - _LOG_MEAN) / _LOG_DEVIATION).astype(np.float32)


def stack_frames(
    frames: Float32[ndarray, "frames bands"], frames_per_chunk: int
) -> Float32[ndarray, "chunks features"]:
    """Stacks consecutive frames into chunks: features = frames_per_chunk * bands, frame-major.

    The last chunk is filled by repeating the last frame, so that no value occurs that audio cannot have.
    """
    require(frames_per_chunk >= 1, f"frames_per_chunk={frames_per_chunk} must be >= 1")
    missing = -len(frames) % frames_per_chunk
    filled = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    return filled.reshape(-1, frames_per_chunk * frames.shape[1])


def chunks_in_spans(
    spans: Iterable[tuple[float, float]], num_chunks: int, frames_per_chunk: int
) -> Bool[ndarray, " chunks"]:
    """Marks the chunks with a frame whose centre is in one of the half-open spans, given in seconds."""
    centres = frame_centres(num_chunks * frames_per_chunk)
    inside = np.zeros(len(centres), dtype=bool)
    for start, end in spans:
        inside |= (start <= centres) & (centres < end)
    return np.any(inside.reshape(num_chunks, frames_per_chunk), axis=1)


def frame_centres(frames: int) -> Float[ndarray, " frames"]:
    """Returns the middle of each frame's window, in seconds."""
    return (np.arange(frames) * HOP + WINDOW / 2) / SAMPLE_RATE


@functools.cache
def _hann() -> Float64[ndarray, " window"]:
    return 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(WINDOW) / WINDOW)

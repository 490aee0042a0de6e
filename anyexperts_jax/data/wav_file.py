"""Writes WAV files."""

import pathlib

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from anyexperts_jax.data.example import SAMPLE_RATE


def write_wav(path: pathlib.Path, audio: Float32[ndarray, " samples"]) -> None:
    """Writes mono audio in [-1, 1] at SAMPLE_RATE as 16-bit WAV."""
    from scipy.io import wavfile

    wavfile.write(path, SAMPLE_RATE, np.clip(np.round(audio * 32768), -32768, 32767).astype(np.int16))

"""Reads sound files: WAV with SciPy, other formats with `soundfile`, and resamples with `soxr` (extra `media`)."""

import io
import pathlib
import struct
import warnings

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.data.damage import DAMAGE, MEDIA_EXTRA, said
from anyexperts_jax.data.example import SAMPLE_RATE

RATES = (1_000, 768_000)  # allowed samples per second
MAX_SAMPLES = 2**27  # over all channels: three quarters of an hour of stereo at 24 kHz
_KINDS = "it must be a WAV file, or one that the package soundfile reads: FLAC, Ogg, MP3"


def read_sound(file: bytes | pathlib.Path, where: str) -> tuple[int, np.ndarray]:
    """Reads a file; returns (samples per second, samples [n] or [n, channels] in the file's own type).

    Raises:
      UserError: in one line with `where`, if the file is missing, not a sound, cut short, empty or too long.
    """
    try:
        data = file if isinstance(file, bytes) else file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the sound in {where}: {said(error)}; it must be a WAV file") from error
    rate, samples = _read_wav(data, where) if data[:4] in (b"RIFF", b"RIFX", b"RF64") else _read_other(data, where)
    low, high = RATES
    require(low <= rate <= high, f"the sound in {where} has {rate} samples a second; valid: {low} to {high}")
    require(samples.size > 0, f"the sound in {where} is empty; give a WAV file with samples in it")
    require(samples.size <= MAX_SAMPLES, _too_long(where, samples.size))
    return rate, samples


def resampled(mono: Float[ndarray, " n"], rate: int, where: str) -> Float[ndarray, " samples"]:
    """Resamples to SAMPLE_RATE with soxr's high quality; samples at that rate are returned unchanged.

    Raises:
      UserError: if soxr is not installed.
    """
    if rate == SAMPLE_RATE:
        return mono
    try:
        import soxr
    except ImportError as error:
        what = f"the sound in {where} has {rate} samples a second, not {SAMPLE_RATE}: resampling it needs"
        raise UserError(f"{what} {MEDIA_EXTRA}") from error
    wanted = -(-len(mono) * SAMPLE_RATE // rate)  # rounded up
    silence = np.zeros(rate // SAMPLE_RATE + 2, mono.dtype)
    found: np.ndarray = soxr.resample(np.concatenate([mono, silence]), rate, SAMPLE_RATE)
    return found[:wanted]


def _too_long(where: str, samples: int) -> str:
    return f"the sound in {where} has {samples:,} samples, more than {MAX_SAMPLES:,}; cut it into pieces"


def _read_wav(data: bytes, where: str) -> tuple[int, np.ndarray]:
    """Reads a WAV file with SciPy, or with soundfile for other codings; refuses a file that was cut short."""
    from scipy.io import wavfile

    promised = _promised_bytes(data)
    there = f"it was cut short, {len(data)} bytes of {promised}; it must be a WAV file that is whole"
    require(len(data) >= promised, f"cannot read the sound in {where}: {there}")
    # SciPy reads integers, floats, and either with an extended header; telephones use others.
    if _coding(data) not in (None, 1, 3, 0xFFFE):
        return _read_other(data, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # about unknown chunks
            rate, samples = wavfile.read(io.BytesIO(data))
    except DAMAGE as error:
        raise UserError(f"cannot read the sound in {where}: {said(error)}; it must be a WAV file") from error
    return int(rate), samples


def _chunks(data: bytes) -> dict[bytes, tuple[int, int]]:
    """Returns the begin of each chunk of a WAV file and its size by its header, up to the samples."""
    order = ">I" if data[:4] == b"RIFX" else "<I"
    found: dict[bytes, tuple[int, int]] = {}
    at = 12
    while at + 8 <= len(data) and b"data" not in found:
        size = struct.unpack(order, data[at + 4 : at + 8])[0]
        found.setdefault(data[at : at + 4], (at + 8, size))
        at += 8 + size + size % 2
    return found


def _promised_bytes(data: bytes) -> int:
    """Returns the file's length by its header; 0 if the program that wrote it to a pipe left that open."""
    begin, size = _chunks(data).get(b"data", (0, 0xFFFFFFFF))
    return 0 if size == 0xFFFFFFFF else begin + size


def _coding(data: bytes) -> int | None:
    """Returns the number of the samples' coding; None if the header does not have it."""
    begin, size = _chunks(data).get(b"fmt ", (0, 0))
    if size < 2 or begin + 2 > len(data):
        return None
    coding: int = struct.unpack(">H" if data[:4] == b"RIFX" else "<H", data[begin : begin + 2])[0]
    return coding


def _read_other(data: bytes, where: str) -> tuple[int, np.ndarray]:
    """Reads another format of libsndfile; a file that was cut short is refused if the format shows it."""
    try:
        import soundfile
    except ImportError as error:
        what = f"cannot read the sound in {where}: no WAV header; {_KINDS} (pip install soundfile), which is in"
        raise UserError(f"{what} {MEDIA_EXTRA}") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, channels = file.frames, file.channels
            require(promised * channels <= MAX_SAMPLES, _too_long(where, promised * channels))
            rate, samples = file.samplerate, file.read(dtype="float32")
    except UserError:
        raise
    except (soundfile.SoundFileError, *DAMAGE) as error:
        raise UserError(f"cannot read the sound in {where}: {said(error)}; {_KINDS}") from error
    whole = len(samples) >= promised and not _ogg_without_end(data)
    require(whole, f"cannot read the sound in {where}: it was cut short, after {len(samples):,} samples; {_KINDS}")
    return int(rate), samples


def _ogg_without_end(data: bytes) -> bool:
    """Whether it is an Ogg file whose last page is incomplete or not marked as last; the header has no length."""
    if data[:4] != b"OggS":
        return False
    page = data[data.rfind(b"OggS") :]  # 27 bytes, the sizes of its segments, then the segments
    whole = len(page) > 26 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return not (whole and page[5] & 4)

"""Turns sounds into log-mel frames for an audio tower, following the checkpoint's preprocessor_config.json.

The features are Whisper's: frames centred on every `hop`-th sample, a Hann window, and mel bands on Slaney's scale.
Their logarithm is cut off eight decades below the loudest. A sound's features do not depend on the others in the batch.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.decode import decode_audio
from anyexperts_jax.data.example import SAMPLE_RATE
from anyexperts_jax.models.config import AudioTowerConfig
from anyexperts_jax.pretrained.hub_config import HubConfig, keys
from anyexperts_jax.pretrained.pictures import BOTH, IMAGES, SETTINGS

_PART = "feature_extractor"  # key of processor_config.json
_KNOWN = SETTINGS | keys("feature_extractor_type")
_HIGH_HZ = 8000.0  # upper end of the highest band
_BREAK_HZ, _MELS_TO_BREAK = 1000.0, 15.0  # Slaney's scale is linear up to here
_MELS_PER_E = 27 / math.log(6.4)  # and logarithmic above: so many mels per factor of e
_FLOOR = 1e-10  # lowest power of a band
_DECADES = 8.0  # dynamic range of the power
_BLOCK = 4096  # frames transformed at a time


class Sound(NamedTuple):
    """The log-mel frames of a sound."""

    mel_SX: Float32[ndarray, "S X"]

    @property
    def modality(self) -> Modality:
        return Modality.AUDIO


@dataclasses.dataclass(frozen=True)
class Hearing:
    """How samples become frames; see `read_hearing`."""

    bands: int  # mel bands, the features X of a frame
    window: int  # samples per frame
    hop: int  # samples from one frame to the next

    def sound(self, value: Any, where: str) -> Sound:
        """Returns the frames of one sound: a path, the bytes of a file, or mono samples at SAMPLE_RATE.

        Raises:
          UserError: naming it by `where`, if it cannot be decoded or is too short.
        """
        source = pathlib.Path(value) if isinstance(value, str) else value
        samples = decode_audio(source, where)
        least = max(self.window // 2 + 1, self.hop)
        require(len(samples) >= least, f"{where} has {len(samples)} samples; the model needs {least} at least")
        return Sound(self.log_mel(samples))

    def log_mel(self, samples: Float32[ndarray, " samples"]) -> Float32[ndarray, "S X"]:
        """Computes a frame for every `hop` samples, in float32."""
        half = self.window // 2
        padded = np.pad(samples.astype(np.float32), half, mode="reflect")
        count = len(samples) // self.hop
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop][:count]
        place = np.arange(self.window, dtype=np.float32)
        hann = (0.5 - 0.5 * np.cos(np.float32(2 * math.pi / self.window) * place)).astype(np.float32)
        filters = mel_filters(self.window, self.bands)
        blocks = []
        for first in range(0, count, _BLOCK):
            spectrum = np.fft.rfft(frames[first : first + _BLOCK] * hann[None]).astype(np.complex64)
            power = spectrum.real**2 + spectrum.imag**2
            blocks.append(np.log10(np.maximum(power @ filters, np.float32(_FLOOR))))
        log_SX = np.concatenate(blocks)
        cut = np.maximum(log_SX, log_SX.max() - np.float32(_DECADES))
        return ((cut + np.float32(4)) / np.float32(4)).astype(np.float32)


@functools.cache
def mel_filters(window: int, bands: int) -> Float32[ndarray, "bins bands"]:
    """Returns triangular filters over the FFT's bins, with corners equally spaced on Slaney's mel scale.

    Each is scaled by 2 over its width in hertz, so that all have the same area.
    """
    corners = _hertz(np.linspace(0.0, _mels(_HIGH_HZ), bands + 2))
    bins = np.linspace(0.0, SAMPLE_RATE / 2, window // 2 + 1)[:, None]
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    filters = np.maximum(0.0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    found: np.ndarray = (filters * (2.0 / (high - low))).astype(np.float32)
    found.flags.writeable = False
    return found


def _mels(hertz: float) -> float:
    if hertz < _BREAK_HZ:
        return hertz * _MELS_TO_BREAK / _BREAK_HZ
    return _MELS_TO_BREAK + _MELS_PER_E * math.log(hertz / _BREAK_HZ)


def _hertz(mels: np.ndarray) -> np.ndarray:
    """The inverse of `_mels`."""
    above = _BREAK_HZ * np.exp((mels - _MELS_TO_BREAK) / _MELS_PER_E)
    return np.where(mels < _MELS_TO_BREAK, mels * _BREAK_HZ / _MELS_TO_BREAK, above)


def sounds_of(audios: Sequence[Any], path: pathlib.Path, tower: AudioTowerConfig) -> list[Sound]:
    """Returns the frames of sounds. Items that are `Sound` already are checked and kept.

    Args:
      path: the checkpoint, whose settings are used.

    Raises:
      UserError: for an item that cannot be decoded; the message has its index.
    """
    found = []
    settings = None
    for number, value in enumerate(audios):
        where = f"sound {number}" + (f" ({value})" if isinstance(value, str | pathlib.Path) else "")
        if isinstance(value, Sound):
            shape = value.mel_SX.shape
            fits = len(shape) == 2 and shape[0] > 0 and shape[1] == tower.mel_bins
            require(fits, f"{where}: frames of shape {shape}; need [S, {tower.mel_bins}]")
            found.append(value)
            continue
        settings = settings or read_hearing(path, tower)
        found.append(settings.sound(value, where))
    return found


def read_hearing(folder: pathlib.Path, tower: AudioTowerConfig) -> Hearing:
    """Reads a checkpoint's settings of audio.

    Args:
      tower: the tower that the frames must fit.

    Raises:
      UserError: if there are none, they do not fit the tower, or they ask for something that is not supported.
    """
    hub = _settings(folder)
    hub.require_known(_KNOWN)
    hub.only("feature_extractor_type", "WhisperFeatureExtractor")
    hub.only("sampling_rate", SAMPLE_RATE)
    for key in ("dither", "padding_value"):
        hub.only(key, 0.0, 0)
    bands = hub.whole("feature_size")
    fits = bands == tower.mel_bins
    require(fits, f"{hub.where}: feature_size={bands}, but config.json's audio_config makes it {tower.mel_bins}")
    window, hop = hub.whole("n_fft", 400), hub.whole("hop_length", 160)
    require(window >= 2 and window % 2 == 0, f"{hub.where}: n_fft={window} must be even and >= 2")
    require(hop >= 1, f"{hub.where}: hop_length={hop} must be >= 1")
    return Hearing(bands, window, hop)


def _settings(folder: pathlib.Path) -> HubConfig:
    for name in (IMAGES, BOTH):
        path = folder / name
        if not path.is_file():
            continue
        whole = HubConfig(parse_json_object(read_text(path, name), str(path)), str(path))
        if name == BOTH and whole.get(_PART) is not None:
            return whole.part(_PART)
        if name == IMAGES and whole.get("feature_size") is not None:
            return whole
    raise UserError(
        f"{folder} holds neither a {IMAGES} with feature_size nor a {BOTH} with {_PART}; copy it from where the model "
        "is from"
    )

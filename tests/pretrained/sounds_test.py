"""Log-mel frames: bands, the end of a sound, and settings that are refused."""

import json

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.config import AudioTowerConfig
from anyexperts_jax.pretrained.sounds import Hearing, mel_filters, read_hearing
from pretrained.tiny_omni import SOUNDS

TOWER = AudioTowerConfig(mel_bins=10)
HEARING = Hearing(bands=16, window=400, hop=160)


def test_mel_filters_have_equal_areas():
    filters = mel_filters(400, 16)
    assert filters.shape == (201, 16)
    assert filters.min() == 0
    np.testing.assert_allclose(filters.sum(axis=0) * 40, 1.0, rtol=0.1)  # bins are 40 Hz apart
    peaks = filters.argmax(axis=0)
    assert (np.diff(peaks) > 0).all()


@pytest.mark.parametrize("hertz", [300.0, 1500.0, 6000.0])
def test_a_tone_is_loudest_in_its_band(hertz):
    samples = np.sin(2 * np.pi * hertz / 16000 * np.arange(8000)).astype(np.float32)
    mel_SX = HEARING.log_mel(samples)
    assert mel_SX.shape == (50, 16)
    assert mel_SX.dtype == np.float32
    band = mel_filters(400, 16)[round(hertz / 40)].argmax()
    assert (mel_SX[5:-5].argmax(axis=1) == band).all()


def test_levels_far_below_the_loudest_are_cut_off():
    silent = HEARING.log_mel(np.zeros(3200, np.float32))
    np.testing.assert_allclose(silent, (-10 + 4) / 4, rtol=1e-6)
    loud = np.zeros(6400, np.float32)
    loud[:1600] = np.random.default_rng(0).standard_normal(1600)
    found = HEARING.log_mel(loud)
    assert found.max() - found.min() == pytest.approx(2.0)  # eight decades, at four decades per unit


def test_transforming_in_blocks_gives_the_same_frames(monkeypatch):
    samples = np.random.default_rng(1).standard_normal(9000).astype(np.float32)
    whole = HEARING.log_mel(samples)
    monkeypatch.setattr("anyexperts_jax.pretrained.sounds._BLOCK", 7)
    np.testing.assert_allclose(HEARING.log_mel(samples), whole, atol=1e-6)


SETTINGS = [
    ({"feature_size": 12}, "feature_size=12, but config.json's audio_config makes it 10"),
    ({"sampling_rate": 8000}, "sampling_rate=8000 is not supported, only 16000"),
    ({"dither": 0.1}, "dither=0.1 is not supported"),
    ({"n_fft": 401}, "n_fft=401 must be even"),
    ({"hop_length": 0}, "hop_length=0 must be >= 1"),
    ({"feature_extractor_type": "SeamlessM4TFeatureExtractor"}, 'only "WhisperFeatureExtractor"'),
    ({"mel_floor": 1.0}, "mel_floor=1.0: not supported"),
    (None, "holds neither a preprocessor_config.json with feature_size nor a processor_config.json"),
]


@pytest.mark.parametrize(("changes", "message"), SETTINGS, ids=[message[:30] for _, message in SETTINGS])
def test_unsupported_settings_are_refused_by_name(tmp_path, changes, message):
    if changes is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SOUNDS, **changes}))
    with pytest.raises(UserError) as error:
        read_hearing(tmp_path, TOWER)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_may_share_a_file(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": SOUNDS}))
    assert read_hearing(tmp_path, TOWER) == Hearing(bands=10, window=400, hop=160)

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import features
from anyexperts_jax.data.example import SAMPLE_RATE


def slow_log_power(audio: np.ndarray, num_bands: int) -> np.ndarray:
    """Computes the log-mel power frame by frame, with the Fourier transform and the mel filters written as sums."""
    low, high = (2595 * np.log10(1 + hz / 700) for hz in (60, 7600))
    corners = [700 * (10 ** ((low + (high - low) * i / (num_bands + 1)) / 2595) - 1) for i in range(num_bands + 2)]
    rows = []
    for start in range(0, len(audio) - 399, 160):
        n = np.arange(400)
        window = np.sin(np.pi * n / 400) ** 2
        samples = audio[start : start + 400].astype(np.float64) * window
        row = np.zeros(num_bands)
        for k in range(257):
            power = abs(np.sum(samples * np.exp(-2j * np.pi * k * n / 512))) ** 2
            hz = k * 16_000 / 512
            for band in range(num_bands):
                left, top, right = corners[band : band + 3]
                if left < hz <= top:
                    row[band] += power * (hz - left) / (top - left)
                elif top < hz < right:
                    row[band] += power * (right - hz) / (right - top)
        rows.append(np.log10(row))
    return np.array(rows)


def test_log_mel_equals_a_slow_discrete_fourier_transform():
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, 1000).astype(np.float32)
    expected = (slow_log_power(audio, 20) + 0.6) / 1.4
    actual = features.log_mel(audio, 20)
    assert actual.dtype == np.float32
    assert actual.shape == (4, 20)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)  # float32 rounding of values below 4


@pytest.mark.parametrize("hz", [200.0, 1000.0, 3000.0, 6000.0])
def test_a_tone_is_loudest_in_the_band_around_it(hz):
    tone = 0.3 * np.sin(2 * np.pi * hz * np.arange(4000) / SAMPLE_RATE)
    loudest = features.log_mel(tone.astype(np.float32), 32).argmax(axis=1)
    corners = np.linspace(features.hz_to_mel(60.0), features.hz_to_mel(7600.0), 34)
    nearest = np.abs(corners[1:-1] - features.hz_to_mel(hz)).argmin()
    np.testing.assert_array_equal(loudest, nearest)


def test_mel_scale_goes_back_and_forth():
    assert features.hz_to_mel(1000.0) == pytest.approx(1000.0, abs=0.02)  # the formula's anchor
    hz = np.array([60.0, 440.0, 7600.0])
    np.testing.assert_allclose(features.mel_to_hz(np.array([features.hz_to_mel(f) for f in hz])), hz, rtol=1e-12)


@pytest.mark.parametrize(("samples", "frames"), [(0, 1), (1, 1), (400, 1), (559, 1), (560, 2), (38_400, 238)])
def test_frames_of_short_and_long_audio(samples, frames):
    assert features.num_frames(samples) == frames
    mel = features.log_mel(np.zeros(samples, np.float32), 16)
    assert mel.shape == (frames, 16)
    assert np.isfinite(mel).all()


def test_chunks_stack_frames_and_repeat_the_last():
    frames = np.arange(10, dtype=np.float32).reshape(5, 2)
    chunks = features.stack_frames(frames, 3)
    np.testing.assert_array_equal(chunks, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 8, 9]])


def test_chunks_in_spans_follow_frame_centres():
    # Frame centres lie at 12.5, 22.5, 32.5, 42.5, 52.5, 62.5 ms; two frames to a chunk.
    chosen = features.chunks_in_spans([(0.040, 0.050)], num_chunks=3, frames_per_chunk=2)
    np.testing.assert_array_equal(chosen, [False, True, False])
    np.testing.assert_array_equal(features.chunks_in_spans([(0.0, 0.0125)], 3, 2), [False] * 3)  # half open
    np.testing.assert_array_equal(features.chunks_in_spans([(0.0, 0.013), (0.06, 1.0)], 3, 2), [True, False, True])
    assert not features.chunks_in_spans([], 3, 2).any()


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match="num_bands=0"):
        features.mel_filters(0)
    with pytest.raises(UserError, match="num_bands=200 leaves a band without a bin"):
        features.mel_filters(200)
    with pytest.raises(UserError, match="frames_per_chunk=0"):
        features.stack_frames(np.zeros((2, 2), np.float32), 0)

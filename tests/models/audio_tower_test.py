"""The audio tower: windows and sounds apart, padding without effect, the rows of a chunk."""

import dataclasses

import jax
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.audio_tower import AudioTower, Sounds, places
from anyexperts_jax.models.config import AudioTowerConfig, ModelConfig, VisionTowerConfig
from anyexperts_jax.models.init import abstract_params, named_leaves
from anyexperts_jax.models.paths import tower_of
from anyexperts_jax.nn.config import AttentionConfig, StackConfig

CONFIG = AudioTowerConfig(
    mel_bins=6, chunk_frames=16, window_chunks=2, channels=4, d_model=8, num_layers=1, num_heads=2, d_ff=12
)


def sounds(*lengths, chunks=2, seed=0, changed=None):
    """One window a length; `changed` is a frame, (window, chunk, frame), that gets another value."""
    mel_IOSX = np.zeros((len(lengths), chunks, 16, 6), np.float32)
    frames_IO = np.zeros((len(lengths), chunks), np.int32)
    for w, length in enumerate(lengths):
        own = np.random.default_rng(seed + w).standard_normal((length, 6))
        for a in range(-(-length // 16)):
            part = own[16 * a : 16 * a + 16]
            mel_IOSX[w, a, : len(part)], frames_IO[w, a] = part, len(part)
    if changed is not None:
        mel_IOSX[changed] += 1
    width_IO = np.broadcast_to(np.minimum(np.array(lengths), 16)[:, None], frames_IO.shape).astype(np.int32)
    return Sounds(mel_IOSX, frames_IO, width_IO)


@pytest.fixture(scope="module")
def tower():
    module = AudioTower(CONFIG, 20)
    params = jax.jit(module.init)(jax.random.key(0), sounds(32, 20))
    return jax.jit(module.apply), params


def test_a_window_is_read_alone_and_padding_has_no_effect(tower):
    apply, params = tower
    both = np.asarray(apply(params, sounds(32, 20)))
    assert both.shape == (2, 4, 20)  # two rows a chunk of sixteen frames
    other = np.asarray(apply(params, sounds(32, 20, changed=(1, 0, 3))))
    np.testing.assert_array_equal(both[0], other[0])
    assert (np.abs(both[1, :3] - other[1, :3]).max(axis=-1) > 1e-4).all()  # all rows of a window see one another
    wide = np.asarray(apply(params, sounds(32, 20, chunks=4)))
    np.testing.assert_allclose(wide[:, :4][:1], both[:1], atol=1e-5)
    np.testing.assert_allclose(wide[1, :3], both[1, :3], atol=1e-5)


def test_the_convolutions_of_a_short_sound_end_with_it(tower):
    """Past its width a chunk is zero after each convolution, not only before the first."""
    apply, params = tower
    short = sounds(6, 32)  # behind an even length the first convolution reaches over the end
    narrow = np.asarray(apply(params, short))[0, 0]
    unlike = dataclasses.replace(short, width_IO=np.full((2, 2), 16, np.int32))
    assert np.abs(narrow - np.asarray(apply(params, unlike))[0, 0]).max() > 1e-4


def test_places_are_sines_then_cosines():
    found = np.asarray(places(3, 8))
    assert found.shape == (3, 8)
    np.testing.assert_array_equal(found[0], [0] * 4 + [1] * 4)
    np.testing.assert_allclose(found[2, [0, 3, 4]], [np.sin(2), np.sin(2e-4), np.cos(2)], rtol=1e-5)


def test_its_parameters_are_the_towers(tower):
    attention = AttentionConfig(mrope_section=(8, 4, 4))
    model = ModelConfig(
        vision=None,
        audio=None,
        vision_tower=VisionTowerConfig(num_layers=1, deep_layers=()),
        audio_tower=CONFIG,
        stack=StackConfig(d_model=20, attention=attention),
    )
    own = {name for name in named_leaves(abstract_params(model)) if tower_of(name) == "audio"}
    assert {name.removeprefix("audio_tower/") for name in own} == set(named_leaves(tower[1]["params"]))
    with pytest.raises(UserError, match="audio_tower needs vision_tower"):
        dataclasses.replace(model, vision_tower=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "audio_tower.d_model=8 must be a multiple of num_heads=3"),
        ({"d_model": 2, "num_heads": 1}, "audio_tower.d_model=2 must be even and >= 4"),
        ({"chunk_frames": 0}, "audio_tower.chunk_frames=0 must be >= 1"),
        ({"norm_eps": 0.0}, "audio_tower.norm_eps=0.0 must be > 0"),
    ],
)
def test_a_tower_that_makes_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change)

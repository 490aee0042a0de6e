import jax.numpy as jnp
import numpy as np
from nn.layers import initial_params, random_params, run

from anyexperts_jax.models.audio import AudioEncoder
from anyexperts_jax.models.config import AudioConfig, VisionConfig
from anyexperts_jax.models.media import MediaBatch
from anyexperts_jax.models.vision import VisionEncoder, place_waves
from models.small import SMALL


def media(features_BRX, used_BR=None, **places):
    """Rows of one item, at row, column and time 0 unless given."""
    zeros_BR = jnp.zeros(features_BRX.shape[:2], jnp.int32)
    fields = dict.fromkeys(("item_BR", "time_BR", "grid_row_BR", "grid_column_BR"), zeros_BR)
    fields |= {name: jnp.broadcast_to(jnp.asarray(values), zeros_BR.shape) for name, values in places.items()}
    return MediaBatch(features_BRX, zeros_BR == 0 if used_BR is None else used_BR, **fields)


def two_frames(patches_BPX, **changes):
    """Three patches of one frame, side by side, then three of the next, the last of them unused."""
    places = {"grid_column_BR": [0, 1, 2, 0, 1, 2], "time_BR": [0, 0, 0, 1, 1, 1]}
    return media(patches_BPX, jnp.arange(6)[None] < 5, **(places | changes))


def vision(num_layers):
    encoder = VisionEncoder(VisionConfig(12, 3, 4, num_layers, 20), SMALL.stack)
    patches_BPX = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 12)), jnp.float32)
    params = random_params(encoder, two_frames(patches_BPX))
    return lambda patches, **changes: run(encoder)(params, two_frames(patches, **changes)), patches_BPX


def test_patches_see_their_own_frame_only():
    encode, patches_BPX = vision(num_layers=1)
    before, after = encode(patches_BPX), encode(patches_BPX.at[0, 1].add(1.0))
    changed_P = np.abs(before - after).max(-1)[0] > 1e-5
    np.testing.assert_array_equal(changed_P[:5], [True, True, True, False, False])


def test_patches_see_no_other_picture_of_their_sequence():
    encode, patches_BPX = vision(num_layers=1)
    pictures = {"time_BR": 0, "item_BR": [0, 0, 0, 1, 1, 1]}
    before, after = encode(patches_BPX, **pictures), encode(patches_BPX.at[0, 1].add(1.0), **pictures)
    changed_P = np.abs(before - after).max(-1)[0] > 1e-5
    np.testing.assert_array_equal(changed_P[:5], [True, True, True, False, False])
    np.testing.assert_array_equal(before[0, 3:5], after[0, 3:5])


def test_every_place_has_its_own_code_and_row_and_column_are_not_confused():
    row_BP, column_BP = (a.reshape(1, -1) for a in np.mgrid[:40, :40])
    waves_PX = np.asarray(place_waves(jnp.asarray(row_BP), jnp.asarray(column_BP), 18))[0]
    np.testing.assert_allclose((waves_PX**2).sum(-1), 36, rtol=1e-5)
    squared = 2 * (36 - waves_PX @ waves_PX.T) + 72 * np.eye(1600)
    assert squared.min() > 1.0, "neighbours are the nearest"
    assert place_waves(jnp.zeros((1, 2), int), jnp.ones((1, 2), int), 1).shape == (1, 2, 4)


def test_unused_patches_are_not_seen():
    encode, patches_BPX = vision(num_layers=1)
    before, after = encode(patches_BPX), encode(patches_BPX.at[0, 5].add(1.0))
    np.testing.assert_array_equal(before[0, :5], after[0, :5])


def test_without_layers_each_patch_is_on_its_own_but_knows_its_place_and_time():
    encode, patches_BPX = vision(num_layers=0)
    same_BPX = jnp.broadcast_to(patches_BPX[:, :1], patches_BPX.shape)
    encoded = encode(same_BPX)[0]
    distances = np.abs(encoded[:, None] - encoded[None]).max(-1) + jnp.eye(6)
    assert float(distances.min()) > 1e-2
    changed_P = np.abs(encode(patches_BPX) - encode(patches_BPX.at[0, 1].add(1.0))).max(-1)[0] > 1e-6
    np.testing.assert_array_equal(changed_P, [False, True, False, False, False, False])


def test_embeddings_have_the_scale_of_text():
    encoder = VisionEncoder(VisionConfig(12, 3, 4, 0, 20), SMALL.stack)
    patches = two_frames(vision(num_layers=0)[1])
    encoded_BPD = run(encoder)(initial_params(encoder, patches), patches)
    np.testing.assert_allclose(jnp.mean(encoded_BPD**2, -1), 1.0, rtol=1e-3)


def test_frames_see_the_whole_clip_but_not_past_its_end():
    encoder = AudioEncoder(AudioConfig(10, 1, 20), SMALL.stack)
    frames_BSX = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 10)), jnp.float32)
    used_BS = jnp.arange(4)[None] < jnp.array([[4], [2]])
    clip = lambda frames: media(frames, used_BS, time_BR=jnp.arange(4))  # noqa: E731
    params = random_params(encoder, clip(frames_BSX))
    before = run(encoder)(params, clip(frames_BSX))
    after = run(encoder)(params, clip(frames_BSX.at[:, 3].add(1.0)))
    assert bool((np.abs(before - after)[0].max(-1) > 1e-5).all())
    np.testing.assert_array_equal(before[1, :2], after[1, :2])


def test_the_order_of_frames_matters():
    encoder = AudioEncoder(AudioConfig(10, 1, 20), SMALL.stack)
    frames_BSX = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 10)), jnp.float32)
    clip = lambda frames: media(frames, time_BR=jnp.arange(4))  # noqa: E731
    params = random_params(encoder, clip(frames_BSX))
    forwards = run(encoder)(params, clip(frames_BSX))
    backwards = run(encoder)(params, clip(frames_BSX[:, ::-1]))[:, ::-1]
    assert float(np.abs(forwards - backwards).max()) > 1e-3


def test_a_clip_is_encoded_as_if_alone_whatever_is_beside_it():
    encoder = AudioEncoder(AudioConfig(10, 1, 20), SMALL.stack)
    frames_BSX = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 10)), jnp.float32)
    two = {"item_BR": [0, 0, 1, 1, 1], "time_BR": [0, 1, 0, 1, 2]}
    params = random_params(encoder, media(frames_BSX, **two))
    together = run(encoder)(params, media(frames_BSX, **two))
    alone = run(encoder)(params, media(frames_BSX[:, 2:], time_BR=[0, 1, 2]))
    np.testing.assert_allclose(together[:, 2:], alone, atol=2e-6)
    other = run(encoder)(params, media(frames_BSX.at[:, 0].add(1.0), **two))
    np.testing.assert_array_equal(other[:, 2:], together[:, 2:])
    assert float(np.abs(other[:, 1] - together[:, 1]).max()) > 1e-5

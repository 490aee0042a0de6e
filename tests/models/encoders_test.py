import jax.numpy as jnp
import numpy as np
from nn.layers import initial_params, random_params, run

from anyexperts_jax.models.audio import AudioEncoder
from anyexperts_jax.models.config import AudioConfig, VisionConfig
from anyexperts_jax.models.vision import VisionEncoder
from models.small import SMALL

PLACES_BP = jnp.array([[0, 1, 2, 0, 1, 2]])
TIMES_BP = jnp.array([[0, 0, 0, 1, 1, 1]])


def vision(num_layers):
    encoder = VisionEncoder(VisionConfig(12, 9, 4, num_layers, 20), SMALL.stack)
    patches_BPX = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 12)), jnp.float32)
    used_BP = jnp.arange(6)[None] < 5
    arguments = (PLACES_BP, TIMES_BP, used_BP)
    params = random_params(encoder, patches_BPX, *arguments)
    return lambda patches: run(encoder)(params, patches, *arguments), patches_BPX


def test_patches_see_their_own_frame_only():
    encode, patches_BPX = vision(num_layers=1)
    before, after = encode(patches_BPX), encode(patches_BPX.at[0, 1].add(1.0))
    changed_P = np.abs(before - after).max(-1)[0] > 1e-5
    np.testing.assert_array_equal(changed_P[:5], [True, True, True, False, False])


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
    encoder = VisionEncoder(VisionConfig(12, 9, 4, 0, 20), SMALL.stack)
    arguments = (vision(num_layers=0)[1], PLACES_BP, TIMES_BP, jnp.ones((1, 6), bool))
    encoded_BPD = run(encoder)(initial_params(encoder, *arguments), *arguments)
    np.testing.assert_allclose(jnp.mean(encoded_BPD**2, -1), 1.0, rtol=1e-3)


def test_frames_see_the_whole_clip_but_not_past_its_end():
    encoder = AudioEncoder(AudioConfig(10, 1, 20), SMALL.stack)
    frames_BSX = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 10)), jnp.float32)
    used_BS = jnp.arange(4)[None] < jnp.array([[4], [2]])
    params = random_params(encoder, frames_BSX, used_BS)
    before = run(encoder)(params, frames_BSX, used_BS)
    after = run(encoder)(params, frames_BSX.at[:, 3].add(1.0), used_BS)
    assert bool((np.abs(before - after)[0].max(-1) > 1e-5).all())
    np.testing.assert_array_equal(before[1, :2], after[1, :2])


def test_the_order_of_frames_matters():
    encoder = AudioEncoder(AudioConfig(10, 1, 20), SMALL.stack)
    frames_BSX = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 10)), jnp.float32)
    used_BS = jnp.ones((1, 4), bool)
    params = random_params(encoder, frames_BSX, used_BS)
    forwards = run(encoder)(params, frames_BSX, used_BS)
    backwards = run(encoder)(params, frames_BSX[:, ::-1], used_BS)[:, ::-1]
    assert float(np.abs(forwards - backwards).max()) > 1e-3

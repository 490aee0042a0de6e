"""Latent attention against a loop in float64; with and without the cache, expanded and absorbed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.nn.cache import LatentCache, empty_cache
from anyexperts_jax.nn.config import AttentionConfig, LatentConfig, LoraConfig
from anyexperts_jax.nn.latent_attention import LatentAttention, absorbs
from anyexperts_jax.nn.rope import rotations
from nn.layers import random_params, run

LATENT = LatentConfig(kv_rank=14, query_rank=10, plain_dim=4, rope_dim=6, value_dim=5, score_factor=1.7, norm_eps=0.01)
CONFIG = AttentionConfig(num_heads=3, num_kv_heads=3, head_dim=10, qkv_bias=True, out_bias=True, latent=LATENT)
B, T, D = 2, 9, 8
POSITIONS_BT = jnp.asarray(np.tile(np.arange(T), (B, 1)))
CAUSAL_BTT = jnp.asarray(np.tile(np.tri(T, dtype=bool), (B, 1, 1)))
X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
ROTATION = rotations(CONFIG, POSITIONS_BT)


def setup(config=CONFIG, **fields):
    layer = LatentAttention(config, **fields)
    return run(layer), random_params(layer, X_BTD, CAUSAL_BTT)


def with_latent(**changes):
    return dataclasses.replace(CONFIG, latent=dataclasses.replace(LATENT, **changes))


def turned(x, position, interleaved):
    """The rotated part of one head at one position, in the order that it came in."""
    out = np.empty_like(x)
    for i in range(3):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + 3)
        angle = position * 10_000.0 ** (-i / 3)
        out[first] = x[first] * np.cos(angle) - x[second] * np.sin(angle)
        out[second] = x[second] * np.cos(angle) + x[first] * np.sin(angle)
    return out


def normed(x, scale):
    return x / np.sqrt((x**2).mean() + 0.01) * scale


def loop(params, config, mask_BTT):
    """The definition, head by head and position by position."""
    latent = config.latent
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    y_BTD = np.zeros((B, T, D)) + p["out"]["bias"]
    for b in range(B):
        x_TD = np.asarray(X_BTD[b], np.float64)
        down = x_TD @ p["down"]["kernel"] + p["down"]["bias"]
        own = np.stack([normed(row, p["norm"]["scale"]) for row in down[:, :14]])
        shared = np.stack([turned(row, s, latent.interleaved) for s, row in enumerate(down[:, 14:])])
        for t in range(T):
            if latent.query_rank is None:
                query_HA = np.einsum("d,dha->ha", x_TD[t], p["query"]["kernel"])
            else:
                narrow = x_TD[t] @ p["query_down"]["kernel"] + p["query_down"]["bias"]
                narrow = normed(narrow, p["query_norm"]["scale"])
                query_HA = np.einsum("u,uha->ha", narrow, p["query_up"]["kernel"])
            for h in range(3):
                up = own @ p["up"]["kernel"][:, h]
                query = np.concatenate([query_HA[h, :4], turned(query_HA[h, 4:], t, latent.interleaved)])
                scores = np.concatenate([up[:, :4], shared], axis=1) @ query / 10**0.5 * latent.score_factor
                weights = np.exp(scores) * mask_BTT[b, t]
                y_BTD[b, t] += (weights / weights.sum()) @ up[:, 4:] @ p["out"]["kernel"][h]
    return y_BTD


@pytest.mark.parametrize("changes", [{}, {"query_rank": None, "interleaved": False, "score_factor": 1.0}])
def test_matches_a_loop_over_positions_and_heads(changes):
    config = with_latent(**changes)
    apply, params = setup(config)
    mask_BTT = np.array(CAUSAL_BTT)
    mask_BTT[1, 1:, 0] = False
    y_BTD, none = apply(params, X_BTD, jnp.asarray(mask_BTT), ROTATION)
    assert none is None
    np.testing.assert_allclose(y_BTD, loop(params, config, mask_BTT), atol=2e-5)


def step_by_step(apply, params, sizes, dtype="float32"):
    cache = jax.tree.map(lambda a: a[0], empty_cache(CONFIG, B, T, dtype, 1))
    assert isinstance(cache, LatentCache)
    pieces, start = [], 0
    for size in sizes:
        at = slice(start, start + size)
        part = tuple(r[:, at] for r in ROTATION)
        y_BTD, cache = apply(params, X_BTD[:, at], CAUSAL_BTT[:, at], part, cache, POSITIONS_BT[:, at])
        pieces.append(y_BTD)
        start += size
    return jnp.concatenate(pieces, axis=1)


def test_both_ways_through_the_cache_give_what_the_whole_sequence_gives():
    assert [absorbs(LATENT, queries) for queries in (1, 6, 7)] == [True, True, False]
    apply, params = setup()
    whole_BTD, _ = apply(params, X_BTD, CAUSAL_BTT, ROTATION)
    found_BTD = step_by_step(apply, params, (7, 1, 1))  # expanded, then absorbed
    np.testing.assert_allclose(found_BTD, whole_BTD, rtol=1e-5, atol=5e-6)


def test_an_adapter_of_the_map_up_counts_both_ways():
    lora = LoraConfig(rank=2, patterns=("**/kernel", "kernel", "*/kernel"))
    apply, params = setup(lora=lora)
    assert params["up"]["kernel_lora_a"].shape == (14, 2)
    whole_BTD, _ = apply(params, X_BTD, CAUSAL_BTT, ROTATION)
    np.testing.assert_allclose(step_by_step(apply, params, (7, 1, 1)), whole_BTD, rtol=1e-5, atol=5e-6)
    without = {**params, "up": {"kernel": params["up"]["kernel"]}}
    merged = params["up"]["kernel"] + lora.scale * jnp.einsum(
        "ur,rha->uha", params["up"]["kernel_lora_a"], params["up"]["kernel_lora_b"]
    )
    others = dataclasses.replace(lora, patterns=("query_*/kernel", "o*/kernel", "d*/*"))
    plain = run(LatentAttention(CONFIG, lora=others))
    np.testing.assert_allclose(
        plain({**without, "up": {"kernel": merged}}, X_BTD, CAUSAL_BTT, ROTATION)[0], whole_BTD, rtol=1e-5, atol=5e-6
    )


def test_the_cache_holds_a_latent_and_one_key_for_all_heads():
    cache = empty_cache(CONFIG, 2, 32, "bfloat16", 5)
    assert isinstance(cache, LatentCache)
    assert cache.latents_BSGA.shape == (5, 2, 32, 1, 14 + 6)
    assert cache.length == 32


def test_the_way_that_computes_less_at_the_published_sizes():
    published = LatentConfig(kv_rank=512, query_rank=1536, plain_dim=128, rope_dim=64, value_dim=128)
    assert [absorbs(published, queries) for queries in (1, 170, 171, 4096)] == [True, True, False, False]


def test_bfloat16_stays_within_its_rounding():
    apply, params = setup()
    expected_BTD = np.asarray(apply(params, X_BTD, CAUSAL_BTT, ROTATION)[0])
    narrow, _ = setup(dtype="bfloat16")
    found_BTD = step_by_step(narrow, params, (7, 1, 1), "bfloat16")
    assert found_BTD.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found_BTD, np.float32) - expected_BTD).max() < 0.05 * np.abs(expected_BTD).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 12}, "head_dim=12 must be latent.plain_dim"),
        ({"num_kv_heads": 1}, "num_kv_heads=1 must be num_heads=3"),
        ({"qk_norm": True}, "qk_norm=True has no effect with a latent"),
        ({"clip_qkv": 1.0}, "clip_qkv=1.0 has no effect with a latent"),
        ({"rope_fraction": 0.6}, "rope_fraction=0.6 has no effect with a latent"),
    ],
)
def test_what_does_not_go_with_a_latent(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_rank": 0}, "kv_rank=0 must be >= 1"),
        ({"query_rank": 0}, "query_rank=0 must be >= 1"),
        ({"rope_dim": 5}, "rope_dim=5 must be even"),
        ({"score_factor": 0.0}, "score_factor=0.0 must be > 0"),
    ],
)
def test_a_latent_that_makes_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LATENT, **changes)


def test_the_widths_of_both_kinds():
    assert (CONFIG.rotary_dim, CONFIG.value_dim, CONFIG.projected_dims) == (6, 5, 6 * 15 + 20 + 10)
    plain = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6)
    assert (plain.rotary_dim, plain.value_dim, plain.projected_dims) == (6, 6, 12 * 6)

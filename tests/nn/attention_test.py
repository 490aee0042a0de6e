import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.nn.attention import Attention
from anyexperts_jax.nn.cache import empty_cache
from anyexperts_jax.nn.config import AttentionConfig
from anyexperts_jax.nn.rope import rotate, rotations
from nn.layers import random_params, run

CONFIG = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6)
B, T, D = 2, 5, 8
POSITIONS_BT = jnp.asarray(np.tile(np.arange(T), (B, 1)))
CAUSAL_BTT = jnp.asarray(np.tile(np.tri(T, dtype=bool), (B, 1, 1)))


def setup(config=CONFIG, **fields):
    layer = Attention(config, **fields)
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    return run(layer), random_params(layer, x_BTD, CAUSAL_BTT), x_BTD


def test_matches_a_loop_over_positions_and_heads():
    apply, params, x_BTD = setup()
    mask_BTT = np.array(CAUSAL_BTT)
    mask_BTT[1, 1:, 0] = False
    y_BTD, _ = apply(params, x_BTD, jnp.asarray(mask_BTT))
    w = {name: np.asarray(p["kernel"], np.float64) for name, p in params.items()}
    expected = np.zeros((B, T, D))
    for b in range(B):
        for t in range(T):
            for h in range(4):
                x = np.asarray(x_BTD[b], np.float64)
                query, keys, values = x[t] @ w["query"][:, h], x @ w["key"][:, h // 2], x @ w["value"][:, h // 2]
                weights = np.exp(keys @ query / 6**0.5) * mask_BTT[b, t]
                expected[b, t] += (weights / weights.sum()) @ values @ w["out"][h]
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)


def test_rotation_makes_scores_depend_on_distance_alone():
    query, key = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, 6)), jnp.float32)

    def score(t, s):
        rotated = [rotate(x, rotations(CONFIG, jnp.array([[p]]))) for x, p in ((query, t), (key, s))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(3, 1) == pytest.approx(score(13, 11), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)
    assert score(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-6)


def test_rotation_of_a_hand_computed_pair():
    # Head width 2 and position 1: one pair, turned by 1 rad.
    config = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2)
    turned = rotate(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), rotations(config, jnp.array([[1]])))
    np.testing.assert_allclose(turned.ravel(), [np.cos(1), np.sin(1)], atol=1e-6)


def test_partial_rotation_leaves_the_rest():
    config = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8, rope_fraction=0.5)
    x_BTHA = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)
    turned = rotate(x_BTHA, rotations(config, jnp.array([[5]])))
    np.testing.assert_array_equal(turned[..., 4:], x_BTHA[..., 4:])
    assert not np.allclose(turned[..., :4], x_BTHA[..., :4])


def test_the_cache_gives_what_the_whole_sequence_gives():
    apply, params, x_BTD = setup(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True))
    rotation = rotations(CONFIG, POSITIONS_BT)
    whole_BTD, none = apply(params, x_BTD, CAUSAL_BTT, rotation)
    assert none is None
    cache = jax.tree.map(lambda a: a[0], empty_cache(CONFIG, B, T, "float32", 1))
    for t in range(T):
        at = slice(t, t + 1)
        turned = tuple(r[:, at] for r in rotation)
        y_B1D, cache = apply(params, x_BTD[:, at], CAUSAL_BTT[:, at], turned, cache, POSITIONS_BT[:, at])
        np.testing.assert_allclose(y_B1D, whole_BTD[:, at], atol=1e-6)


def test_examples_write_the_cache_at_their_own_positions():
    apply, params, x_BTD = setup()
    cache = jax.tree.map(lambda a: a[0], empty_cache(CONFIG, B, T, "float32", 1))
    _, cache = apply(params, x_BTD[:, :1], CAUSAL_BTT[:, :1], None, cache, jnp.array([[3], [1]]))
    written_BS = np.abs(cache.keys_BSGA).sum((2, 3)) > 0
    np.testing.assert_array_equal(written_BS, np.arange(T) == np.array([[3], [1]]))


def test_a_row_that_may_see_nothing_is_finite():
    _, params, x_BTD = setup()
    mask_BTT = CAUSAL_BTT.at[0].set(False)
    loss = lambda x: Attention(CONFIG).apply({"params": params}, x, mask_BTT)[0].sum()  # noqa: E731
    value, grad = jax.jit(jax.value_and_grad(loss))(x_BTD)
    assert bool(np.isfinite(value))
    assert bool(np.isfinite(grad).all())


def test_softmax_is_float32_in_bfloat16():
    apply, params, x_BTD = setup()
    y_BTD, _ = run(Attention(CONFIG, dtype="bfloat16"))(params, x_BTD.astype(jnp.bfloat16), CAUSAL_BTT)
    assert y_BTD.dtype == jnp.bfloat16
    np.testing.assert_allclose(y_BTD.astype(jnp.float32), apply(params, x_BTD, CAUSAL_BTT)[0], atol=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"head_dim": 7}, "7 rotated dimensions; must be even"),
        ({"rope_fraction": 0.0}, r"rope_fraction=0.0 must be in \(0, 1\]"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be > 0"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        AttentionConfig(**fields)

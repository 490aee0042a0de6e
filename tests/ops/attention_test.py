import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.ops.attention import attention
from anyexperts_jax.ops.attention.api import IMPLEMENTATIONS, default_implementation

B, T, H, G, A = 3, 20, 4, 2, 6


def operands(kv_length=T, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, A), (B, kv_length, G, A), (B, kv_length, G, A)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def causal_mask(kv_length=T):
    """Each position its past, with a hole; position 3 of the first example sees nothing at all."""
    mask_BTS = np.tile(np.tri(T, kv_length, dtype=bool), (B, 1, 1))
    mask_BTS[1, 2:, 1] = False
    mask_BTS[0, 3] = False
    return mask_BTS


def float64_attention(queries_BTHA, keys_BSGA, values_BSGA, mask_BTS):
    queries, keys, values = (np.asarray(a, np.float64) for a in (queries_BTHA, keys_BSGA, values_BSGA))
    keys, values = (np.repeat(a, H // G, axis=2) for a in (keys, values))
    scores = np.einsum("btha,bsha->bhts", queries, keys) / np.sqrt(A)
    scores = np.where(mask_BTS[:, None], scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bsha->btha", weights / weights.sum(-1, keepdims=True), values)


@pytest.mark.parametrize("kv_length", [T, T + 7])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_float64(implementation, kv_length):
    mask_BTS = causal_mask(kv_length)
    found = attention(*operands(kv_length), jnp.asarray(mask_BTS), implementation)
    np.testing.assert_allclose(found, float64_attention(*operands(kv_length), mask_BTS), atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_stays_within_its_rounding(implementation):
    mask_BTS = causal_mask()
    found = attention(*operands(dtype=jnp.bfloat16), jnp.asarray(mask_BTS), implementation)
    assert found.dtype == jnp.bfloat16
    expected = float64_attention(*operands(dtype=jnp.bfloat16), mask_BTS)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=2e-2)


def test_gradients_agree():
    mask_BTS, target = jnp.asarray(causal_mask()), np.random.default_rng(1).normal(size=(B, T, H, A))

    def gradients(implementation):
        return jax.grad(lambda *a: (attention(*a, mask_BTS, implementation) * target).sum(), (0, 1, 2))(*operands())

    for found, expected in zip(gradients("by_example"), gradients("xla"), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_comes_from_what_is_masked(implementation):
    mask_BTS, (queries, keys, values) = jnp.asarray(np.tile(np.tri(T, dtype=bool), (B, 1, 1))), operands()
    before = attention(queries, keys, values, mask_BTS, implementation)
    after = attention(queries, keys.at[:, 11:].add(5.0), values.at[:, 11:].set(1e4), mask_BTS, implementation)
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert not np.array_equal(before[:, 11:], after[:, 11:])


def test_scores_are_not_kept_for_the_backward_pass():
    mask_BTS, rows = jnp.asarray(causal_mask()), operands()
    _, pullback = jax.vjp(lambda *a: attention(*a, mask_BTS, "by_example"), *rows)
    kept = sum(a.size for a in jax.tree.leaves(pullback))
    means_and_softmax = rows[0].size + 2 * B * T * H
    assert kept <= sum(a.size for a in rows) + mask_BTS.size + means_and_softmax


def test_the_default_leaves_sharded_batches_and_decoding_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert default_implementation(T) == "by_example"
    assert default_implementation(1) == "xla"
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert default_implementation(T) == "xla"


def test_heads_that_do_not_divide_and_unknown_implementations_are_refused():
    queries, keys, values = operands()
    with pytest.raises(UserError, match="3 query heads cannot share 2 key heads"):
        attention(queries[:, :, :3], keys, values, jnp.asarray(causal_mask()))
    with pytest.raises(UserError, match=r"implementation='flash'.*by_example"):
        attention(queries, keys, values, jnp.asarray(causal_mask()), "flash")

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.ops.attention import CausalMask, api, attention, cudnn
from anyexperts_jax.ops.attention.api import IMPLEMENTATIONS, default_implementation
from anyexperts_jax.ops.attention.splash import splash_attention

B, T, H, G, A = 3, 20, 4, 2, 6
F32 = jnp.dtype(jnp.float32)


def operands(kv_length=T, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, A), (B, kv_length, G, A), (B, kv_length, G, A)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def causal_mask(kv_length=T):
    """A causal mask with a hole; position 3 of the first example attends to nothing."""
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
def test_values_may_have_a_width_of_their_own(implementation):
    """As in latent attention: values and gradients are those of values padded to the keys' width."""
    mask_BTS, (queries, keys, values) = jnp.asarray(causal_mask()), operands()
    target = np.random.default_rng(1).normal(size=(B, T, H, 4)).astype(np.float32)

    def total(queries, keys, values):
        return (attention(queries, keys, values, mask_BTS, implementation)[..., :4] * target).sum()

    padded = values.at[..., 4:].set(0)
    found, grads = jax.value_and_grad(total, (0, 1, 2))(queries, keys, values[..., :4])
    expected, padded_grads = jax.value_and_grad(total, (0, 1, 2))(queries, keys, padded)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for own, wanted in zip(grads, padded_grads, strict=True):
        np.testing.assert_allclose(own, wanted[..., : own.shape[-1]], atol=5e-6)


def test_no_kernel_takes_values_of_another_width():
    queries, keys, values = operands()
    mask = CausalMask(jnp.ones((B, T), bool))
    found = attention(queries, keys, values[..., :4], mask)
    np.testing.assert_allclose(found, attention(queries, keys, values, mask)[..., :4], atol=1e-6)
    with pytest.raises(UserError, match="implementation='cudnn'"):
        attention(queries, keys, values[..., :4], mask, "cudnn")


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
    assert default_implementation(T, A, F32, causal=True) == "by_example"
    assert default_implementation(1, A, F32, causal=False) == "xla"
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert default_implementation(T, A, F32, causal=True) == "xla"


def test_heads_that_do_not_divide_and_unknown_implementations_are_refused():
    queries, keys, values = operands()
    with pytest.raises(UserError, match="3 query heads cannot share 2 key heads"):
        attention(queries[:, :, :3], keys, values, jnp.asarray(causal_mask()))
    with pytest.raises(UserError, match=r"implementation='flash'.*by_example"):
        attention(queries, keys, values, jnp.asarray(causal_mask()), "flash")


def long_operands(dtype=jnp.float32):
    """One full block of positions and one with padding, in sizes that the TPU kernel supports."""
    rng = np.random.default_rng(0)
    rows = tuple(jnp.asarray(rng.normal(size=(2, 256, heads, 128)), dtype) for heads in (4, 2, 2))
    return rows, CausalMask(jnp.asarray(np.arange(256) < np.array([[256], [131]])))


def in_segments(mask):
    """The mask with the first example in three segments, one of which starts inside a block of positions."""
    segment_T = np.searchsorted([40, 130], np.arange(256), side="right")
    return CausalMask(mask.valid_BT, jnp.asarray(np.stack([segment_T, 0 * segment_T]), jnp.int32))


@pytest.mark.parametrize("packed", [False, True])
def test_splash_matches_xla_in_values_and_gradients_at_valid_positions(packed):
    rows, mask = long_operands()
    mask = in_segments(mask) if packed else mask

    def total(run):
        out = lambda *rows: jnp.where(mask.valid_BT[..., None, None], run(*rows, mask), 0)  # noqa: E731
        return jax.value_and_grad(lambda *rows: (jnp.sin(out(*rows)).sum(), out(*rows)), (0, 1, 2), has_aux=True)(*rows)

    (_, found), gradients = total(functools.partial(splash_attention, interpret=True))
    (_, expected), expected_gradients = total(attention)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_a_causal_mask_is_the_array_it_stands_for():
    queries, keys, values = operands()
    mask = CausalMask(jnp.asarray(np.arange(T) < np.array([[T], [5], [1]])))
    dense_BTT = np.tri(T, dtype=bool) & np.asarray(mask.valid_BT)[:, None, :]
    np.testing.assert_array_equal(mask.dense(), dense_BTT)
    for implementation in IMPLEMENTATIONS:
        found = attention(queries, keys, values, mask, implementation)
        np.testing.assert_array_equal(found, attention(queries, keys, values, mask.dense(), implementation))


def test_a_segment_sees_itself_alone():
    """In the dense mask, and in the one for kernels that handle causality themselves."""
    segment_BT = jnp.asarray([[0, 0, 1, 1, 1, 1], [3, 3, 3, 4, 5, 5]])
    mask = CausalMask(jnp.asarray(np.arange(6) < np.array([[5], [6]])), segment_BT)
    expected_BTT = np.zeros((2, 6, 6), bool)
    for b, t, s in np.ndindex(2, 6, 6):
        expected_BTT[b, t, s] = segment_BT[b, t] == segment_BT[b, s] and (b == 1 or s < 5)
    np.testing.assert_array_equal(mask.without_causality(), expected_BTT)
    np.testing.assert_array_equal(mask.dense(), expected_BTT & np.tri(6, dtype=bool))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_another_segment_changes_nothing(implementation):
    queries, keys, values = operands()
    mask = CausalMask(jnp.ones((B, T), bool), jnp.asarray(np.tile(np.arange(T) >= 8, (B, 1)), jnp.int32))
    before = attention(queries, keys, values, mask, implementation)
    after = attention(queries, keys.at[:, 2:8].add(5.0), values.at[:, 2:8].set(1e4), mask, implementation)
    np.testing.assert_array_equal(before[:, 8:], after[:, 8:])
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert not np.array_equal(before[:, 2:8], after[:, 2:8])
    alone = attention(queries[:, 8:], keys[:, 8:], values[:, 8:], CausalMask(jnp.ones((B, T - 8), bool)), "xla")
    np.testing.assert_allclose(before[:, 8:], alone, atol=2e-6)


def test_splash_is_a_tpus_default_where_it_runs_and_refused_elsewhere(monkeypatch):
    rows, mask = long_operands()
    with pytest.raises(UserError, match="implementation='splash' needs a TPU, not 'cpu'"):
        attention(*rows, mask, "splash")
    with pytest.raises(UserError, match=r"implementation='splash' is unknown; valid: xla, by_example"):
        attention(*rows, mask.dense(), "splash")
    short = tuple(a[:, :100] for a in rows)
    with pytest.raises(UserError, match=r"multiples of 128.* there are 100 queries"):
        splash_attention(*short, CausalMask(mask.valid_BT[:, :100]), interpret=True)
    monkeypatch.setattr(api, "platform", lambda: "tpu")
    assert default_implementation(4096, 128, F32, causal=True) == "splash"
    assert default_implementation(4096, 128, F32, causal=False) == "xla"
    assert default_implementation(4096, 64, F32, causal=True) == "xla"
    assert default_implementation(100, 128, F32, causal=True) == "xla"


def test_cudnn_is_an_attached_gpus_default_in_16_bits_and_refused_elsewhere(monkeypatch):
    rows, mask = long_operands(jnp.bfloat16)
    with pytest.raises(UserError, match=r"implementation='cudnn' needs an NVIDIA GPU .* not 'cpu'"):
        attention(*rows, mask, "cudnn")
    with pytest.raises(UserError, match=r"implementation='cudnn' is unknown; valid: xla, by_example"):
        attention(*rows, mask.dense(), "cudnn")
    bf16 = jnp.dtype(jnp.bfloat16)
    assert default_implementation(4096, 64, bf16, causal=True) != "cudnn"
    monkeypatch.setattr(cudnn, "is_available", lambda: True)
    assert default_implementation(4096, 64, bf16, causal=True) == "cudnn"
    for length, width, dtype, causal in [
        (4096, 64, bf16, False),
        (4096, 64, F32, True),
        (4095, 64, bf16, True),
        (4096, 60, bf16, True),
        (4096, 256, bf16, True),
    ]:
        assert default_implementation(length, width, dtype, causal=causal) != "cudnn"
    with pytest.raises(UserError, match="there are 256 queries and 256 keys of width 128 in float32"):
        attention(*long_operands()[0], mask, "cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize(("kv_heads", "packed"), [(1, False), (2, False), (4, False), (2, True)])
def test_cudnn_matches_float32_in_values_and_gradients_at_valid_positions(kv_heads, packed):
    (queries, keys, values), _ = long_operands(jnp.bfloat16)
    rows = (queries, *(jnp.tile(a[:, :, :1], (1, 1, kv_heads, 1)) for a in (keys, values)))
    valid_BT = np.arange(256) < np.array([[256], [131]])
    valid_BT[0, 7] = False  # a hole too, which lengths could not say
    mask = CausalMask(jnp.asarray(valid_BT))
    mask = in_segments(mask) if packed else mask

    def total(implementation, *rows):
        out_BTHA = attention(*rows, mask, implementation).astype(jnp.float32)
        out_BTHA = jnp.where(mask.valid_BT[..., None, None], out_BTHA, 0)
        return jnp.sin(out_BTHA).sum(), out_BTHA

    def run(implementation, rows):
        f = jax.jit(jax.value_and_grad(functools.partial(total, implementation), (0, 1, 2), has_aux=True))
        (_, out_BTHA), gradients = f(*rows)
        return out_BTHA, *gradients

    with jax.default_matmul_precision("highest"):
        expected = run("xla", tuple(a.astype(jnp.float32) for a in rows))
    for a, b in zip(run("cudnn", rows), expected, strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=2e-2 * scale)

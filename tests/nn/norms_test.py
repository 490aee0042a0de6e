import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.nn.norms import RMSNorm


def test_divides_by_the_root_mean_square():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32) * 5
    scale = np.linspace(0.5, 2, 8, dtype=np.float32)
    y = RMSNorm(1e-6).apply({"params": {"scale": scale}}, x)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_is_float32_inside():
    x = jnp.full(
        (1, 4), 300.0, jnp.bfloat16
    )  # its square, 90000, is no bfloat16 number; and 4 of them overflow float16
    y = RMSNorm(1e-6, dtype="bfloat16").apply({"params": {"scale": jnp.ones(4)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), 1.0)


def test_zeros_stay_zero_with_finite_gradients():
    norm, params = RMSNorm(1e-6), {"params": {"scale": jnp.ones(4)}}
    value, grad = jax.value_and_grad(lambda x: norm.apply(params, x).sum())(jnp.zeros((1, 4)))
    assert float(value) == 0.0
    assert bool(jnp.isfinite(grad).all())

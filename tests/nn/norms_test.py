import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.nn.norms import LayerNorm, RMSNorm
from nn.layers import run


def test_divides_by_the_root_mean_square():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)) * 5
    scale = np.linspace(0.5, 2, 8)
    y = run(RMSNorm(1e-6))({"scale": jnp.float32(scale)}, jnp.float32(x))
    np.testing.assert_allclose(y, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale, rtol=1e-5)


def test_is_float32_inside():
    # The mean square, 257^2 / 4 with one nonzero entry, needs more bits than bfloat16's eight.
    x = jnp.array([[256.0, 1.0, 1.0, 1.0]], jnp.bfloat16)
    y = run(RMSNorm(1e-6))({"scale": jnp.ones(4)}, x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.array([[256.0, 1, 1, 1]]) / np.sqrt((256.0**2 + 3) / 4), rtol=1e-6)
    assert run(RMSNorm(1e-6, dtype="bfloat16"))({"scale": jnp.ones(4)}, x).dtype == jnp.bfloat16


def test_zeros_stay_zero_with_finite_gradients():
    apply = RMSNorm(1e-6).apply
    value, grad = jax.value_and_grad(lambda x: apply({"params": {"scale": jnp.ones(4)}}, x).sum())(jnp.zeros((1, 4)))
    assert float(value) == 0.0
    assert bool(np.isfinite(grad).all())


def test_layer_norm_subtracts_the_mean_too():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)) * 5 + 3
    scale, bias = np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)
    y = run(LayerNorm(1e-6))({"scale": jnp.float32(scale), "bias": jnp.float32(bias)}, jnp.float32(x))
    centred = x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(
        y, centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias, atol=1e-5
    )

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.routing.importance import importance, modulate


def test_importance_is_the_sigmoid_in_float32():
    # sigmoid(0) = 1/2, sigmoid(log 3) = 3/4
    w = importance(jnp.array([0.0, np.log(3.0)], jnp.bfloat16))
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(w, [0.5, 0.75], atol=1e-3)  # log 3 in bfloat16 is off by up to 2^-9


def test_modulate_adds_alpha_w_h():
    # 2 + 0.1 * 0.5 * 2 = 2.1; -4 + 0.1 * 1 * -4 = -4.4
    h = modulate(jnp.array([[2.0], [-4.0]]), jnp.array([0.5, 1.0]), 0.1)
    np.testing.assert_allclose(h, [[2.1], [-4.4]], rtol=1e-6)


def test_modulate_keeps_the_dtype_and_rounds_once():
    # 100 * 1.005 = 100.5 is a bfloat16 value; 1.005 is not: it rounds to 1.0078, and the product to 101.
    out = modulate(jnp.full((1, 1), 100.0, jnp.bfloat16), jnp.array([0.5]), 0.01)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), [[100.5]])


def test_modulation_brings_a_gradient_to_the_importance_logit():
    # d/dz sum(h (1 + alpha sigmoid(z))) = alpha w (1 - w) sum(h) = 0.01 * 0.25 * 3
    grad = jax.grad(lambda z: modulate(jnp.array([[1.0, 2.0]]), importance(z), 0.01).sum())(jnp.zeros(1))
    np.testing.assert_allclose(grad, [0.0075], rtol=1e-5)

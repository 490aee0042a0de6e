import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from anyexperts_jax.nn.mlp import GeluMLP, SwiGLU, gated
from nn.layers import initial_params, run


def test_is_swiglu():
    rng = np.random.default_rng(0)
    x, gate, up, down = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (4, 6), (4, 6), (6, 4)))
    params = {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": down}}
    y = run(SwiGLU(6))(params, jnp.asarray(x))
    g = (x @ gate).astype(np.float64)
    np.testing.assert_allclose(y, (g / (1 + np.exp(-g)) * (x @ up)) @ down, rtol=1e-4, atol=1e-5)


def test_the_residual_scale_is_that_of_the_down_projection():
    params = initial_params(SwiGLU(64, residual_scale=0.1), jnp.ones((1, 64)))
    stds = {name: float(p["kernel"].std()) * 8 for name, p in params.items()}  # 8 = sqrt(fan-in)
    assert abs(stds["gate"] - 1) < 0.05  # 4096 draws: standard error 0.011
    assert abs(stds["down"] - 0.1) < 0.005


def test_the_activations_gradients_equal_autodiffs():
    rng = np.random.default_rng(0)
    gate, up = (jnp.asarray(rng.normal(size=(5, 7)), jnp.float32) for _ in range(2))
    ours = lambda g, u: (gated(g, u) ** 2).sum()  # noqa: E731
    theirs = lambda g, u: ((jax.nn.silu(g) * u) ** 2).sum()  # noqa: E731
    grads, expected = (jax.jit(jax.grad(f, (0, 1)))(gate, up) for f in (ours, theirs))
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_gelu_is_exact_or_approximated_with_tanh(exact):
    rng = np.random.default_rng(0)
    x, up, down, b_up, b_down = (rng.normal(size=s).astype(np.float32) for s in ((2, 4), (4, 6), (6, 3), 6, 3))
    params = {"up": {"kernel": up, "bias": b_up}, "down": {"kernel": down, "bias": b_down}}
    h = (x @ up + b_up).astype(np.float64)
    cdf = (1 + (erf(h / 2**0.5) if exact else np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))) / 2
    y = run(GeluMLP(6, 3, exact=exact))(params, jnp.asarray(x))
    np.testing.assert_allclose(y, (h * cdf) @ down + b_down, rtol=1e-4, atol=1e-5)

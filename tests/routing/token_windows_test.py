"""One window per token: requests with different budgets in one batch are routed as if each were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax import AnyExpertsConfig, MoE, route
from anyexperts_jax.core.errors import UserError

CONFIG = AnyExpertsConfig(num_experts=8, num_virtual=2, k_min=2, k_max=6)
WINDOWS = ((1.0, 3.0), (2.5, 5.0), (2.0, 6.0))


def test_each_token_is_routed_as_with_its_own_window_alone():
    random = np.random.default_rng(0)
    logits_NC, importance_N = random.normal(size=(12, CONFIG.num_columns)), random.normal(size=12)
    window_N2 = jnp.repeat(jnp.asarray(WINDOWS, jnp.float32), 4, axis=0)
    routed = jax.jit(lambda window: route(CONFIG, logits_NC, importance_N, window=window))
    together = routed(window_N2)
    for number, window in enumerate(WINDOWS):
        own = slice(4 * number, 4 * number + 4)
        alone = routed(jnp.asarray(window))  # tokens are routed independently
        np.testing.assert_array_equal(together.slots_N[own], alone.slots_N[own])
        np.testing.assert_array_equal(together.expert_ids_NK[own], alone.expert_ids_NK[own])
        np.testing.assert_allclose(together.weights_NK[own], alone.weights_NK[own], rtol=1e-6)


def test_the_layer_accepts_one_window_per_token():
    layer = MoE(CONFIG, d_ff=8)
    x_BTD = jax.random.normal(jax.random.key(0), (3, 4, 8))
    params = jax.jit(layer.init)(jax.random.key(1), x_BTD)
    window_BT2 = jnp.broadcast_to(jnp.asarray(WINDOWS, jnp.float32)[:, None], (3, 4, 2))
    run = jax.jit(lambda window: layer.apply(params, x_BTD, window=window))
    y_BTD, trace = run(window_BT2)
    for row, window in enumerate(WINDOWS):
        alone_BTD, own = run(jnp.asarray(window))
        np.testing.assert_array_equal(trace.slots_BT[row], own.slots_BT[row])
        np.testing.assert_allclose(y_BTD[row], alone_BTD[row], atol=1e-5)
    with pytest.raises(UserError, match=r"window has shape \(3, 5, 2\); it must be \(3, 4, 2\) or \(2,\)"):
        run(jnp.ones((3, 5, 2)))


def test_other_policies_refuse_windows_per_token():
    config = AnyExpertsConfig.static_top_k(8, 2)
    config = config.__class__(**{**vars(config), "policy": "top_p", "policy_dial": 0.5})
    with pytest.raises(UserError, match="policy='top_p' takes one window for all tokens"):
        jax.jit(lambda window: route(config, np.zeros((4, 8)), np.zeros(4), window=window))(jnp.ones((4, 2)))

import jax.numpy as jnp
import numpy as np

from anyexperts_jax.routing.bias import update_expert_bias


def test_bias_moves_by_the_sign_of_mean_load_minus_load():
    # mean load 4: [+, -, 0, 0]
    bias = update_expert_bias(jnp.array([0.0, 0.0, 0.0, 1.0]), jnp.array([1.0, 7.0, 4.0, 4.0]), 0.001)
    np.testing.assert_allclose(bias, [0.001, -0.001, 0.0, 1.0], atol=1e-9)


def test_layers_are_updated_separately():
    bias = update_expert_bias(jnp.zeros((2, 2)), jnp.array([[0.0, 2.0], [30.0, 10.0]]), 0.5)
    np.testing.assert_array_equal(bias, [[0.5, -0.5], [-0.5, 0.5]])


def test_a_step_without_tokens_moves_nothing():
    np.testing.assert_array_equal(update_expert_bias(jnp.ones(3), jnp.zeros(3), 0.1), jnp.ones(3))


def test_repeated_updates_balance_a_skewed_router():
    """Top-1 of two experts, one favoured by 0.5: the bias must close the gap and then stay within a step of it."""
    logits = jnp.stack([jnp.full(64, 0.5), jnp.linspace(-0.2, 0.2, 64)], axis=1)
    bias = jnp.zeros(2)
    for _ in range(100):
        chosen = (logits + bias[None]).argmax(axis=1)
        load = jnp.array([(chosen == 0).sum(), (chosen == 1).sum()], jnp.float32)
        bias = update_expert_bias(bias, load, 0.01)
    assert abs(float(load[0]) - 32) <= 4

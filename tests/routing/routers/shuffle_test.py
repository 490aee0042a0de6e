import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.routing.routers.shuffle import shuffled_logits


def test_real_columns_are_shuffled_for_each_token_and_virtual_ones_stay():
    logits_NC = jnp.tile(jnp.arange(6.0), (200, 1))
    shuffled = np.asarray(shuffled_logits(jax.random.key(0), logits_NC, 4))
    np.testing.assert_array_equal(np.sort(shuffled[:, :4], axis=1), np.asarray(logits_NC)[:, :4])
    np.testing.assert_array_equal(shuffled[:, 4:], logits_NC[:, 4:])
    assert len(np.unique(shuffled, axis=0)) == 24  # every order of four comes up
    assert 0.15 < (shuffled[:, 0] == 0).mean() < 0.35

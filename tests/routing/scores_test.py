import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.routing.scores import probabilities, ranking

# Two real columns and one virtual; importance 0.25. softmax of [log 2, 0, 0] is [1/2, 1/4, 1/4].
LOGITS = jnp.array([[np.log(2.0), 0.0, 0.0]], jnp.float32)
W = jnp.array([0.25])


def _config(**fields):
    return AnyExpertsConfig(num_experts=2, num_virtual=1, k_min=1, k_max=2, rho_max=0.2, **fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"iar": "off"}, [np.log(2), 0, 0]),
        ({"iar": "add"}, [np.log(2) + 0.25, 0.25, -0.25]),
        ({"iar": "multiply_logits"}, [1.25 * np.log(2), 0, 0]),
        ({"iar": "multiply_softmax"}, [1.25 / 2, 1.25 / 4, 0.75 / 4]),
        # sigmoid(log 2) = 2/3, sigmoid(0) = 1/2
        ({"iar": "multiply_sigmoid", "scores": "sigmoid"}, [1.25 * 2 / 3, 1.25 / 2, 0.75 / 2]),
        ({"iar": "off", "selection": "scores"}, [1 / 2, 1 / 4, 1 / 4]),
        ({"iar": "off", "scores": "sigmoid", "selection": "scores"}, [2 / 3, 1 / 2, 1 / 2]),
    ],
)
def test_ranking_by_hand(fields, expected):
    real, virtual = ranking(_config(**fields), LOGITS, W, None)
    np.testing.assert_allclose(jnp.concatenate([real, virtual], axis=1)[0], expected, rtol=1e-6, atol=1e-7)


def test_scores_after_additive_iar_are_the_softmax_of_tilted_logits():
    real, virtual = ranking(_config(iar="add", selection="scores"), LOGITS, W, None)
    # e^(1/4) [2, 1] against e^(-1/4)
    up, down = np.exp(0.25), np.exp(-0.25)
    np.testing.assert_allclose(
        jnp.concatenate([real, virtual], axis=1)[0], np.array([2 * up, up, down]) / (3 * up + down), rtol=1e-6
    )


def test_the_bias_is_added_last():
    real, virtual = ranking(_config(iar="off", selection="scores"), LOGITS, W, jnp.array([0.0, 0.5, -0.25]))
    np.testing.assert_allclose(real[0], [0.5, 0.75], rtol=1e-6)
    np.testing.assert_allclose(virtual[0], [0.0], atol=1e-7)


def test_the_gap_between_real_and_virtual_grows_with_importance():
    # Every form of IAR must have this property.
    w = jnp.array([0.1, 0.5, 0.9])
    logits = jnp.ones((3, 3))
    for iar, scores in (
        ("add", "softmax"),
        ("multiply_logits", "softmax"),
        ("multiply_softmax", "softmax"),
        ("multiply_sigmoid", "sigmoid"),
    ):
        real, virtual = ranking(_config(iar=iar, scores=scores), logits, w, None)
        gap = real[:, 0] - virtual[:, 0]
        assert (jnp.diff(gap) > 0).all(), iar


def test_probabilities_are_the_scores_before_iar_summing_to_one():
    np.testing.assert_allclose(probabilities(_config(), LOGITS)[0], [0.5, 0.25, 0.25], rtol=1e-6)
    # sigmoid scores 2/3, 1/2, 1/2 sum to 5/3
    np.testing.assert_allclose(probabilities(_config(scores="sigmoid"), LOGITS)[0], [0.4, 0.3, 0.3], rtol=1e-6)


def test_sigmoids_that_underflow_have_a_finite_share_and_gradient():
    def share(logits):
        return probabilities(_config(scores="sigmoid"), logits)

    # The 1e-20 in the denominator is negligible down to sigmoids of 1e-13; e^-200 is 0 in float32.
    np.testing.assert_allclose(share(jnp.full((1, 3), -30.0)), jnp.full((1, 3), 1 / 3), rtol=1e-6)
    for logit in (-50.0, -200.0):
        grad = jax.grad(lambda logits: share(logits)[0, 0])(jnp.full((1, 3), logit))
        assert np.isfinite(grad).all()

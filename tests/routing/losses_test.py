import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.routing.losses import balance_loss, masked_mean
from anyexperts_jax.routing.regularisers import Importances, logit_l2, mean_target
from anyexperts_jax.routing.route import route
from routing.compiled import gradients, routed

# Three columns, two real and one virtual; one slot each. Softmax of [log 2, 0, 0] is [1/2, 1/4, 1/4].
LOGITS = jnp.array([[np.log(2.0), 0.0, 0.0], [0.0, 0.0, np.log(2.0)]], jnp.float32)


def _config(**fields):
    return AnyExpertsConfig(num_experts=2, num_virtual=1, k_min=1, k_max=1, rho_max=0.9, iar="off", **fields)


def test_balance_over_the_batch_by_hand():
    # Token 0 takes real 0, token 1 the virtual column: f = [1/2, 0, 1/2]; P = [3/8, 1/4, 3/8].
    # 3 (1/2 * 3/8 + 1/2 * 3/8) = 9/8
    losses = routed(_config(), LOGITS, jnp.zeros(2)).losses
    assert float(losses["balance"]) == pytest.approx(1.125, abs=1e-6)


def test_balance_per_sequence_by_hand():
    # Each sequence of one token: f is 1 in its column, P 1/2 there: 3/2; the mean is 3/2.
    losses = routed(_config(balance_scope="sequence"), LOGITS, jnp.zeros(2), num_sequences=2).losses
    assert float(losses["balance"]) == pytest.approx(1.5, abs=1e-6)


def test_balance_of_sigmoid_scores_is_normalised_per_token():
    # sigmoid: [2/3, 1/2, 1/2] / (5/3) = [0.4, 0.3, 0.3] and [0.3, 0.3, 0.4]; P = [.35, .3, .35], f = [1/2, 0, 1/2]
    losses = routed(_config(scores="sigmoid"), LOGITS, jnp.zeros(2)).losses
    assert float(losses["balance"]) == pytest.approx(3 * 0.35, abs=1e-6)


def test_balance_of_tied_virtual_columns_averages_their_load():
    # One real column and two tied virtual ones [0, 1, 1], one slot: it goes to the lower virtual column, f = [0, 1, 0],
    # averaged to [0, 1/2, 1/2]. The loss is the same here, P being equal; the load shows the average.
    config = AnyExpertsConfig(
        num_experts=1,
        num_virtual=2,
        k_min=1,
        k_max=1,
        rho_max=0.9,
        iar="off",
        virtual_logits="tied",
    )
    plan = routed(config, jnp.array([[0.0, 1.0, 1.0]]), jnp.zeros(1))
    assert plan.metrics["load_C"].tolist() == [0, 0.5, 0.5]
    # 3 * (e / (1 + 2 e)) = 3 * 0.422319
    assert float(plan.losses["balance"]) == pytest.approx(1.266956, abs=1e-5)


def test_uniform_routing_costs_one():
    loss = balance_loss(jnp.full((6, 4), 0.25), jnp.full((1, 4), 3.0), jnp.ones(6, bool))
    assert float(loss) == pytest.approx(1.0, abs=1e-6)


def test_z_loss_by_hand():
    # logsumexp of both rows is log(2 + 1 + 1) = log 4; its square 1.921812
    assert float(routed(_config(), LOGITS, jnp.zeros(2)).losses["z"]) == pytest.approx(1.921812, abs=1e-5)


def test_importance_regularisers_by_hand():
    z = jnp.array([0.0, np.log(3.0), 5.0], jnp.float32)
    valid = jnp.array([True, True, False])
    w = jax.nn.sigmoid(z)  # 1/2, 3/4
    # mean z^2 = (0 + 1.206949) / 2; (mean w - 0.25)^2 = (0.625 - 0.25)^2
    seen = Importances(_config(importance_target=0.25), z, w, jnp.ones((3, 1)), valid)
    assert float(logit_l2(seen)[1]) == pytest.approx(0.603474, abs=1e-6)
    assert float(mean_target(seen)[1]) == pytest.approx(0.140625, abs=1e-6)


def test_masked_mean():
    assert float(masked_mean(jnp.array([1.0, 5.0, jnp.nan]), jnp.array([True, True, False]))) == 3.0
    assert float(masked_mean(jnp.ones(3), jnp.zeros(3, bool))) == 0.0


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("regulariser", ["logit_l2", "mean_target", "salience"])
def test_padding_has_no_part_in_any_loss_and_gets_no_gradient(scope, regulariser):
    """Two sequences, padded with NaN to four tokens, compared with each sequence by itself."""
    config = _config(balance_scope=scope, importance_regulariser=regulariser)
    rng = np.random.default_rng(0)
    logits, z = rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    valid = np.array([True, True, True, False, True, False, False, False])
    logits[~valid], z[~valid] = np.nan, np.nan

    def losses(logits, z, valid=None, sequences=1):
        return routed(config, logits, z, valid, num_sequences=sequences).losses

    def total(logits, z):
        return sum(route(config, logits, z, valid, num_sequences=2).losses.values())

    padded = losses(logits, z, valid, 2)
    compact = losses(logits[valid], z[valid])
    for name in ("importance", "z"):
        np.testing.assert_allclose(padded[name], compact[name], rtol=1e-6)
    if scope == "batch":
        np.testing.assert_allclose(padded["balance"], compact["balance"], rtol=1e-6)
    else:
        alone = [float(losses(logits[s], z[s])["balance"]) for s in (slice(0, 3), slice(4, 5))]
        np.testing.assert_allclose(padded["balance"], np.mean(alone), rtol=1e-6)
    for grad in gradients(total, logits, z):
        assert not np.asarray(grad)[~valid].any()
        assert np.isfinite(grad).all()
        assert np.abs(np.asarray(grad)[valid]).max() > 0


def test_a_sequence_of_padding_only_is_left_out_of_the_mean_over_sequences():
    valid = jnp.array([True, False])
    loss = routed(_config(balance_scope="sequence"), LOGITS, jnp.zeros(2), valid, num_sequences=2).losses["balance"]
    assert float(loss) == pytest.approx(1.5, abs=1e-6)  # the first sequence's own


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_batch_of_padding_only_costs_nothing(scope):
    config = _config(balance_scope=scope, importance_regulariser="mean_target")

    def loss(logits, z):
        plan = route(config, logits, z, jnp.zeros(2, bool), num_sequences=2)
        return sum(plan.losses.values()) + plan.weights_NK.sum() + plan.virtual_weight_N.sum()

    assert float(jax.jit(loss)(LOGITS, jnp.ones(2))) == 0
    assert not any(np.asarray(g).any() for g in gradients(loss, LOGITS, jnp.ones(2)))


def test_the_balance_loss_pushes_the_overloaded_column_down():
    # Both tokens take real 0: the gradient of its logit is positive, of the others negative, and f passes none.
    logits = jnp.array([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    (grad,) = gradients(lambda x: route(_config(), x, jnp.zeros(2)).losses["balance"], logits)
    assert (grad[:, 0] > 0).all()
    assert (grad[:, 1:] < 0).all()
    # 3 * P_0's derivative: 3 * p (1 - p) / 2 tokens, p = e / (e + 2) = 0.576117
    assert float(grad[0, 0]) == pytest.approx(1.5 * 0.576117 * 0.423883, abs=1e-5)

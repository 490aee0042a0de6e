import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.routing.route import route
from routing.compiled import gradients, routed

E, V = 4, 3


def _config(**fields):
    fields = {"num_experts": E, "num_virtual": V, "k_min": 4, "k_max": 4, "rho_max": 0.25, "iar": "off", **fields}
    return AnyExpertsConfig(**fields)


# Four slots, cap 1. Rank: v0 (5), v1 (4), v2 (3), r0 (2), r1 (1), r2 (0), r3 (-1). v1 and v2 are surplus: r0, r1, r2.
LOGITS = jnp.array([[2.0, 1.0, 0.0, -1.0, 5.0, 4.0, 3.0]])
Z = jnp.zeros(1)  # w = 1/2
EXP = np.exp([2.0, 1.0, 0.0])  # 7.3891, 2.7183, 1; exp(5) = 148.4132; sum 159.5205


def _weights(config, logits=LOGITS, z=Z):
    plan = route(config, logits, z)
    return plan.weights_NK[0], float(plan.virtual_weight_N[0])


def test_normalised_over_real_and_virtual_slots():
    weights, virtual = _weights(_config())
    # [7.3891, 2.7183, 1, 148.4132] / 159.5205
    np.testing.assert_allclose(weights, [0.046321, 0.017040, 0.006269, 0], atol=1e-6)
    assert virtual == pytest.approx(0.930371, abs=1e-6)
    assert float(weights.sum()) + virtual == pytest.approx(1.0, abs=1e-6)


def test_normalised_over_real_slots_only():
    weights, virtual = _weights(_config(normalisation="real"))
    # 7.3891 / 11.1073 = 0.665241, 2.7183 / 11.1073 = 0.244728, 1 / 11.1073 = 0.090031; the virtual weight as before
    np.testing.assert_allclose(weights, [0.665241, 0.244728, 0.090031, 0], atol=1e-6)
    assert virtual == pytest.approx(0.930371, abs=1e-6)


def test_normalisation_none_keeps_the_scores():
    weights, virtual = _weights(_config(normalisation="none"))
    scores = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum()
    np.testing.assert_allclose(weights, [*scores[:3], 0], atol=1e-6)
    assert virtual == pytest.approx(float(scores[4]), abs=1e-6)


def test_normalisation_one_gives_every_slot_weight_one():
    weights, virtual = _weights(_config(normalisation="one"))
    np.testing.assert_array_equal(weights, [1, 1, 1, 0])
    assert virtual == 1


@pytest.mark.slow
def test_a_single_slots_weight_of_one_teaches_the_router_only_by_the_raw_gradient():
    def gradient(normalisation):
        config = AnyExpertsConfig.static_top_k(E, 1, normalisation=normalisation)
        logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
        weight = lambda logits: route(config, logits, Z).weights_NK[0, 0]  # noqa: E731
        return weight(logits), jax.grad(weight)(logits)[0]

    (unit, none), (same, raw_grad) = gradient("all"), gradient("all_raw_gradient")
    assert float(unit) == float(same) == 1.0
    np.testing.assert_array_equal(none, 0.0)
    score = np.exp([2.0, 1.0, 0.0, -1.0]) / np.exp([2.0, 1.0, 0.0, -1.0]).sum()
    np.testing.assert_allclose(raw_grad, score[0] * (np.eye(4)[0] - score), atol=1e-6)
    np.testing.assert_allclose(gradient("none")[1], raw_grad, atol=1e-7)


def test_scaling_factor_scales_both():
    weights, virtual = _weights(_config(scaling_factor=2.5))
    np.testing.assert_allclose(weights, 2.5 * np.array([0.046321, 0.017040, 0.006269, 0]), atol=3e-6)
    assert virtual == pytest.approx(2.5 * 0.930371, abs=3e-6)


def test_sigmoid_scores():
    weights, virtual = _weights(_config(scores="sigmoid"))
    # sigmoid(2, 1, 0, 5) = 0.880797, 0.731059, 0.5, 0.993307; sum 3.105163
    np.testing.assert_allclose(weights, [0.283656, 0.235433, 0.161022, 0], atol=1e-6)
    assert virtual == pytest.approx(0.319889, abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "real", "virtual"),
    [
        # w = 1/2: real scores up, virtual scores down
        ({"iar": "add"}, np.exp([2.5, 1.5, 0.5]), np.exp(4.5)),
        # 3, 1.5, 0 and 2.5: real 0 leads now, virtual 0 stays within the cap
        ({"iar": "multiply_logits"}, np.exp([3.0, 1.5, 0.0]), np.exp(2.5)),
        ({"iar": "multiply_softmax"}, 1.5 * EXP, 0.5 * np.exp(5.0)),
    ],
)
def test_iar_tilts_the_weights(fields, real, virtual):
    weights, virtual_weight = _weights(_config(**fields))
    np.testing.assert_allclose(weights[:3], real / (real.sum() + virtual), rtol=1e-5)
    assert virtual_weight == pytest.approx(virtual / (real.sum() + virtual), rel=1e-5)


def test_iar_multiplying_sigmoids():
    weights, virtual = _weights(_config(iar="multiply_sigmoid", scores="sigmoid"))
    # real 1.5 * (0.880797, 0.731059, 0.5, sigmoid(-1) = 0.268941); virtual 0.5 * 0.993307 = 0.496653 ranks below r2
    # (0.75) and above r3 (0.403412): sum 1.321196 + 1.096588 + 0.75 + 0.496653 = 3.664437
    np.testing.assert_allclose(weights, [0.360546, 0.299251, 0.204670, 0], atol=1e-6)
    assert virtual == pytest.approx(0.135533, abs=1e-6)


def test_the_expert_bias_moves_the_ranking_and_not_the_weights():
    config = _config(k_min=2, k_max=2, num_virtual=0, rho_max=0.0, expert_bias=True)
    plan = routed(config, LOGITS[:, :E], Z, bias_C=jnp.array([-10.0, 0.0, 0.0, 3.0]))
    assert plan.expert_ids_NK.tolist() == [[3, 1]]  # ranks -8, 1, 0, 2
    # logits -1 and 1: 1 / (1 + e^2) = 0.119203
    np.testing.assert_allclose(plan.weights_NK, [[0.119203, 0.880797]], atol=1e-6)


def test_all_virtual_tokens_have_a_bounded_weight_and_finite_gradients():
    for normalisation in ("all", "real", "all_raw_gradient"):
        config = _config(k_min=1, k_max=1, rho_max=0.9, normalisation=normalisation)
        plan = routed(config, LOGITS, Z)
        assert (int(plan.real_slots_N[0]), int(plan.virtual_slots_N[0])) == (0, 1)
        assert plan.expert_ids_NK.tolist() == [[E]]
        assert not plan.weights_NK.any()
        assert float(plan.virtual_weight_N[0]) == pytest.approx(1.0, abs=1e-6)
        grads = gradients(lambda logits, z, config=config: _weighted_sum(route(config, logits, z)), LOGITS, Z)
        assert all(np.isfinite(g).all() for g in grads)


def _weighted_sum(plan):
    return (
        plan.weights_NK * jnp.arange(1.0, plan.weights_NK.shape[1] + 1)[None]
    ).sum() + 3 * plan.virtual_weight_N.sum()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalisation", ["all", "real", "none", "one", "all_raw_gradient"])
@pytest.mark.parametrize("scale", [1e4, -1e4, 80.0])
def test_extreme_logits_give_finite_weights_and_gradients(scores, normalisation, scale):
    config = _config(scores=scores, normalisation=normalisation, iar="add", slot_gradient="straight_through")

    def loss(logits, z):
        plan = route(config, logits, z)
        return _weighted_sum(plan) + sum(plan.losses.values())

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(scale * LOGITS, Z)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_a_huge_unselected_logit_does_not_underflow_the_selected_scores():
    """The cap excludes a virtual column with logit 200, next to which every real softmax score underflows to 0."""
    config = _config(k_min=2, k_max=2, rho_max=0.2)  # round(0.4) = 0 virtual slots
    weights, virtual = _weights(config, jnp.array([[1.0, 0.0, -1.0, -1.0, 200.0, 200.0, 200.0]]))
    np.testing.assert_allclose(weights, [0.731059, 0.268941], atol=1e-6)
    assert virtual == 0


def test_a_huge_logit_that_the_bias_keeps_out_does_not_affect_the_selected():
    # Expert 0 has by far the largest logit, 300, and ranks last because of its bias: exp(300) overflows, 1 / exp(300)
    # underflows. It is a candidate all the same: the bound is four slots, although the token gets two (w = 0).
    config = _config(k_min=2, k_max=4, num_virtual=0, rho_max=0.0, expert_bias=True)
    logits, bias = jnp.array([[300.0, 1.0, 0.0, -1.0]]), jnp.array([-400.0, 0.0, 0.0, 0.0])

    def weights(logits):
        return route(config, logits, jnp.full(1, -20.0), bias_C=bias).weights_NK

    np.testing.assert_allclose(jax.jit(weights)(logits), [[0.731059, 0.268941, 0, 0]], atol=1e-6)
    # d/dl of w_1 is w_1 w_2 = 0.196612 for the first, its negative for the second, and 0 for those not selected
    (grad,) = gradients(lambda logits: weights(logits)[0, 0], logits)
    np.testing.assert_allclose(grad, [[0, 0.196612, -0.196612, 0]], atol=1e-6)


class TestStraightThrough:
    """K = 1 + 3 w, w = sigmoid(z); slots fade in linearly between roundings."""

    def _plan(self, z, **fields):
        config = _config(k_min=1, k_max=4, slot_gradient="straight_through", **fields)
        return route(config, LOGITS, jnp.full(1, z))

    def test_the_forward_pass_is_unchanged(self):
        for z in (-2.0, -0.3, 0.0, 0.7, 3.0):
            off = route(_config(k_min=1, k_max=4), LOGITS, jnp.full(1, z))
            on = self._plan(z)
            np.testing.assert_array_equal(on.weights_NK, off.weights_NK)
            np.testing.assert_array_equal(on.virtual_weight_N, off.virtual_weight_N)

    def test_without_it_rounding_passes_no_gradient(self):
        config = _config(k_min=1, k_max=4)
        assert float(jax.grad(lambda z: _weighted_sum(route(config, LOGITS, jnp.full(1, z))))(0.2)) == 0

    @pytest.mark.parametrize("z", [-0.5, -0.1, 0.1, 0.5])  # K = 2.13, 2.43, 2.57, 2.87: two or three slots
    def test_gradient_is_that_of_the_last_slot_fading_in(self, z):
        w = 1 / (1 + np.exp(-z))
        K = int(np.floor(1 + 3 * w + 0.5))
        # Cap round(0.25 * 2) = round(0.25 * 3) = 1: v0 (5), then r0 (2), then r1 (1).
        scores = np.exp([5.0, 2.0, 1.0][:K])
        values = np.array([3.0, 1.0, 2.0][:K])  # each slot's factor in _weighted_sum

        def loss(membership):
            faded = scores * np.append(np.ones(K - 1), membership)
            return (faded * values).sum() / faded.sum()

        slope = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
        expected = slope * 3 * w * (1 - w)  # dK/dw = 3, dw/dz = w (1 - w)
        assert float(jax.grad(lambda z: _weighted_sum(self._plan(z)))(z)) == pytest.approx(expected, rel=1e-3)

    @pytest.mark.slow
    def test_the_last_slot_may_be_virtual(self):
        # r0 (6), r1 (5.5) and then v0 (5): at K = 3 the last slot is the virtual one.
        logits = jnp.array([[6.0, 5.5, 0.0, 0.0, 5.0, -9.0, -9.0]])
        config = _config(k_min=3, k_max=4, slot_gradient="straight_through")
        grad = jax.grad(lambda z: route(config, logits, jnp.full(1, z)).virtual_weight_N[0])(-2.0)
        w = 1 / (1 + np.exp(2.0))
        share = np.exp(5.0) / np.exp([6.0, 5.5, 5.0]).sum()
        # d/dm of m s / (rest + m s) at m = 1 is share (1 - share); dK/dw = 1
        assert float(grad) == pytest.approx(share * (1 - share) * w * (1 - w), rel=1e-4)

    def test_no_gradient_at_the_bound(self):
        config = _config(k_min=1, k_max=4, slot_gradient="straight_through")
        window = jnp.array([6.0, 9.0])
        weighted_sum = lambda z, window: _weighted_sum(route(config, LOGITS, jnp.full(1, z), window=window))  # noqa: E731
        grad = jax.jit(jax.grad(weighted_sum))(0.3, window)  # traced, and so clipped
        assert float(grad) == 0

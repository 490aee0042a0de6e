import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.routing.metrics import by_modality
from anyexperts_jax.routing.route import route
from routing.compiled import gradients, routed

# Two slots of two real columns and one virtual (cap 1); the third token is padding.
CONFIG = AnyExpertsConfig(num_experts=2, num_virtual=1, k_min=2, k_max=2, rho_max=0.5, iar="off", alpha=0.0)
LOGITS = jnp.array([[2.0, 0.0, 1.0], [2.0, 1.0, 0.0], [9.0, 9.0, 9.0]])
Z = jnp.array([np.log(3.0), 0.0, 7.0])  # w = 3/4, 1/2
VALID = jnp.array([True, True, False])


def test_metrics_by_hand():
    # Token 0: real 0 and virtual 0. Token 1: real 0 and real 1.
    metrics = routed(CONFIG, LOGITS, Z, VALID).metrics
    assert metrics["load_C"].tolist() == [2, 1, 1]
    assert float(metrics["load_max_over_mean"]) == pytest.approx(2 / 1.5)
    assert float(metrics["mean_slots"]) == 2
    assert float(metrics["mean_real_slots"]) == 1.5
    assert float(metrics["virtual_share"]) == 0.25
    assert float(metrics["mean_importance"]) == pytest.approx(0.625)
    # softmax [2, 1, 0] = .665241, .244728, .090031: entropy 0.271163 + 0.344494 + 0.216739
    assert float(metrics["router_entropy"]) == pytest.approx(0.832396, abs=1e-5)
    assert {value.dtype for value in metrics.values()} == {jnp.dtype(jnp.float32)}


def test_the_load_counts_every_valid_slot():
    rng = np.random.default_rng(0)
    config = AnyExpertsConfig(num_experts=32, num_virtual=8)
    valid = jnp.asarray(rng.random(200) < 0.8)
    plan = routed(
        config,
        jnp.asarray(rng.normal(size=(200, 40)), jnp.float32),
        jnp.asarray(rng.normal(size=200), jnp.float32),
        valid,
    )
    load_E = np.bincount(np.asarray(plan.expert_ids_NK).ravel(), minlength=33)[:32]
    np.testing.assert_array_equal(plan.metrics["load_C"][:32], load_E)
    assert float(plan.metrics["load_C"][32:].sum()) == int(plan.virtual_slots_N.sum())
    assert int(plan.slots_N.sum()) == int(plan.metrics["load_C"].sum())


def test_no_gradient_flows_through_metrics():
    def total(logits, z):
        return sum(value.sum() for value in route(CONFIG, logits, z, VALID).metrics.values())

    for grad in gradients(total, LOGITS, Z):
        assert not grad.any()


def test_metrics_of_padding_only_are_zero():
    metrics = routed(CONFIG, LOGITS, Z, jnp.zeros(3, bool)).metrics
    for name, value in metrics.items():
        assert not value.any(), name


def test_by_modality():
    modality = jnp.array([[Modality.TEXT, Modality.TEXT, Modality.IMAGE], [Modality.IMAGE, Modality.VIDEO, 0]])
    values = jnp.array([[1, 2, 3], [5, 7, 100]])
    valid = jnp.array([[True, True, True], [True, True, False]])
    means = by_modality(values, modality, valid)
    # text (1 + 2) / 2, image (3 + 5) / 2, no audio, video 7
    np.testing.assert_array_equal(means, [1.5, 4.0, np.nan, 7.0])

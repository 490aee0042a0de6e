import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.train.metrics import HISTOGRAM_BINS, plain, routing_means, routing_sums
from train.stand_in import random_batch

CONFIG = AnyExpertsConfig(num_experts=3, num_virtual=1, k_min=2, k_max=4, rho_max=0.25)


def random_trace(batch, layers=2, seed=0) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    shape = (layers, *batch.tokens_BT.shape)
    real, virtual = rng.integers(0, 4, shape), rng.integers(0, 2, shape)
    valid = np.asarray(batch.valid_BT)
    return RoutingTrace(
        importance_BT=jnp.asarray(rng.random(shape), jnp.float32),
        slots_BT=jnp.asarray((real + virtual) * valid),
        real_slots_BT=jnp.asarray(real * valid),
        virtual_slots_BT=jnp.asarray(virtual * valid),
        expert_ids_BTK=jnp.zeros((*shape, 4), jnp.int32),
        losses={},
        metrics={
            "load_C": jnp.asarray([[6.0, 2, 1, 5], [0, 0, 0, 0]]),
            "router_entropy": jnp.asarray([0.5, 1.0]),
            "dropped": jnp.asarray([2.0, 0.0]),
        },
    )


def test_means_match_a_loop_over_tokens():
    batch = random_batch()
    trace = random_trace(batch)
    means = routing_means(CONFIG, routing_sums(trace, batch))
    for modality in range(4):
        tokens = np.argwhere(np.asarray(batch.valid_BT) & (np.asarray(batch.modality_BT) == modality))
        assert means["tokens"][modality] == len(tokens)
        for layer in range(2):
            pick = [(layer, *token) for token in tokens]
            real = [float(trace.real_slots_BT[i]) for i in pick]
            virtual = [float(trace.virtual_slots_BT[i]) for i in pick]
            importance = [float(trace.importance_BT[i]) for i in pick]
            np.testing.assert_allclose(means["real_slots"][layer, modality], np.mean(real), rtol=1e-6)
            share = sum(virtual) / (sum(real) + sum(virtual))
            np.testing.assert_allclose(means["virtual_share"][layer, modality], share, rtol=1e-6)
            np.testing.assert_allclose(means["importance"][layer, modality], np.mean(importance), rtol=1e-5)
            counts, _ = np.histogram(importance, HISTOGRAM_BINS, (0, 1))
            np.testing.assert_allclose(means["importance_histogram"][layer, modality], counts / len(tokens), atol=1e-6)
    np.testing.assert_allclose(means["load_max_over_mean"], [6 / 3, 0])  # of the real experts 6, 2, 1
    np.testing.assert_allclose(means["router_entropy"], [0.5, 1.0], rtol=1e-6)
    assert means["total_dropped"] == 2
    np.testing.assert_allclose(means["dropped_share"], 2 / np.asarray(trace.real_slots_BT).sum(), rtol=1e-6)
    assert means["nominal_real_slots"] == 0.75 * 3
    valid = np.asarray(batch.valid_BT)
    np.testing.assert_allclose(means["mean_real_slots"], np.asarray(trace.real_slots_BT)[:, valid].mean(), rtol=1e-6)
    share = np.asarray(trace.virtual_slots_BT).sum() / np.asarray(trace.slots_BT).sum()
    np.testing.assert_allclose(means["mean_virtual_share"], share, rtol=1e-6)


def test_sums_of_halves_add_up_to_the_whole():
    batch = random_batch()
    trace = random_trace(batch)
    whole = routing_sums(trace, batch)

    def half(part):
        rows = jax.tree.map(lambda x: x[part], batch)
        cut = jax.tree.map(lambda x: x[:, part] if x.ndim > 2 else x / 2, trace)
        return routing_sums(cut, rows)

    added = jax.tree.map(jnp.add, half(slice(0, 4)), half(slice(4, 8)))
    for name in ("tokens_M", "importance_LM", "real_slots_LM", "virtual_slots_LM", "histogram", "load_LC"):
        np.testing.assert_allclose(getattr(added, name), getattr(whole, name), rtol=1e-6)


def test_a_modality_without_tokens_is_nan_and_null():
    batch = random_batch(rows=2)  # text and image only
    means = routing_means(CONFIG, routing_sums(random_trace(batch), batch))
    assert np.isnan(means["real_slots"][:, 3]).all()
    assert plain(means)["real_slots"][0][3] is None
    assert plain(means)["importance_histogram"][0][3][0] is None


def test_nothing_is_dropped_where_there_are_no_slots():
    sums = jax.tree.map(jnp.zeros_like, routing_sums(random_trace(random_batch()), random_batch()))
    assert routing_means(CONFIG, sums)["dropped_share"] == 0


def test_plain_makes_json_values():
    record = {"a": np.float32(1.5), "b": jnp.asarray([1, 2]), "c": float("inf"), "d": (True, None, "x")}
    assert plain(record) == {"a": 1.5, "b": [1, 2], "c": None, "d": [True, None, "x"]}

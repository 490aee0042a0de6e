"""The diversity losses, against which evolution is compared: their values in plain NumPy, and what they train."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train.stand_in import text_batch

from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.evolution.config import UpcycleConfig, upcycled_model
from anyexperts_jax.evolution.diversity import TEMPERATURE, contrast, diversity_apply, local_entropy
from anyexperts_jax.models.init import init_params
from anyexperts_jax.train.step import model_apply
from evolution.stages_test import DENSE, TOP_1

EXPERTS = 3
VALID = np.array([[True, True, True, False], [True, True, False, False]])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_local_entropy_is_the_mean_over_valid_tokens(rng):
    logits = rng.normal(size=(2, 4, EXPERTS)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = -(p * np.log(p)).sum(-1)[VALID].mean()
    np.testing.assert_allclose(local_entropy(jnp.asarray(logits), jnp.asarray(VALID)), wanted, rtol=1e-6)
    sure = jnp.asarray(50.0 * np.eye(EXPERTS, dtype=np.float32)[[[0, 1, 2, 0], [1, 1, 0, 2]]])
    assert local_entropy(sure, jnp.asarray(VALID)) < 1e-6


def test_contrast_against_a_loop(rng):
    y = rng.normal(size=(2, 4, 5)).astype(np.float32)
    expert = np.array([[0, 1, 1, 2], [0, 1, 2, 2]])  # expert 2 gets only padding, so it has no part
    rows, labels = y[VALID], expert[VALID]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    means = np.stack([unit[labels == n].sum(0) for n in (0, 1)])
    cosine = unit @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T / TEMPERATURE
    log_p = cosine - np.log(np.exp(cosine).sum(1, keepdims=True))
    wanted = -np.mean([log_p[i, n] for i, n in enumerate(labels)])
    found = contrast(jnp.asarray(y), jnp.asarray(expert, jnp.int32), jnp.asarray(VALID), EXPERTS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
def test_contrast_is_low_where_experts_differ_and_defined_without_tokens():
    apart = jnp.asarray(np.eye(5, dtype=np.float32)[[[0, 1, 2, 0], [0, 1, 0, 0]]])
    expert = jnp.asarray([[0, 1, 2, 0], [0, 1, 0, 0]], jnp.int32)
    assert contrast(apart, expert, jnp.asarray(VALID), EXPERTS) < 1e-3
    nothing = jnp.zeros((2, 4, 5))
    slope = jax.grad(lambda y: contrast(y, expert, jnp.zeros((2, 4), bool), EXPERTS))(nothing)
    np.testing.assert_array_equal(slope, 0.0)
    assert np.isfinite(jax.grad(lambda y: contrast(y, expert, jnp.asarray(VALID), EXPERTS))(nothing)).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["contrastive", "local_entropy"])
def test_the_diversity_loss_is_added_and_changes_nothing_else(kind):
    dense = dataclasses.replace(DENSE, stack=dataclasses.replace(DENSE.stack, execution=Execution(dispatch="dense")))
    model = upcycled_model(dense, UpcycleConfig(init="noise"), TOP_1)
    params = init_params(model, jax.random.key(0))
    batch = text_batch()
    bias = jnp.zeros(model.router_bias_shape)

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, weight):
        return diversity_apply(kind, weight, model)(params, batch, bias, None, None)

    plain_logits, plain = jax.jit(lambda params: model_apply(model)(params, batch, bias, None, None))(params)
    logits, trace = run(params, 0.5)
    np.testing.assert_array_equal(logits, plain_logits)
    assert set(trace.losses) == {*plain.losses, "diversity"}
    np.testing.assert_allclose(run(params, 1.0)[1].losses["diversity"], 2 * trace.losses["diversity"], rtol=1e-6)
    of_params = jax.jit(jax.grad(lambda params: run(params, 1.0)[1].losses["diversity"].sum()))
    slope = of_params(params)["decoder"]["moe_layers"]["moe"]
    pulls = {part: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope[part])) for part in slope}
    assert (pulls["experts"] > 1e-6) == (kind == "contrastive")
    assert (pulls["router"] > 1e-6) == (kind == "local_entropy"), "but for rounding"

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.small import random_batch, random_params, small

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.evaluate.router_diagnostics import BINS, density_overlap, diagnose, logit_densities
from anyexperts_jax.evaluate.trained import Trained
from anyexperts_jax.evolution.single_expert import expert_similarity
from anyexperts_jax.report.router_charts import diagnostics_table, draw_densities, draw_shares, draw_similarity
from anyexperts_jax.train.config import RunConfig

MOE = AnyExpertsConfig.static_top_k(4, 1, router="per_modality")
CONFIG = dataclasses.replace(small(), moe=MOE)
BATCHES = {"general": [random_batch(CONFIG, seed=seed) for seed in (1, 2)]}


def trained(change=lambda experts: experts):
    params = random_params(CONFIG)
    moe = params["decoder"]["moe_layers"]["moe"]
    moe["experts"] = change(moe["experts"])
    config = object.__new__(RunConfig)  # no test reads the run's data
    object.__setattr__(config, "model", CONFIG)
    return Trained(config, params, jnp.zeros(CONFIG.router_bias_shape), 1)


@pytest.fixture(scope="module")
def found():
    return diagnose(trained(), BATCHES)


def copies(experts):
    return jax.tree.map(lambda w: jnp.broadcast_to(w[:, :1], w.shape), experts)


@pytest.mark.slow
def test_shuffling_costs_nothing_if_experts_are_equal_and_something_if_they_differ(found):
    alike = diagnose(trained(copies), BATCHES)
    np.testing.assert_allclose(alike.shuffled_losses, alike.loss, rtol=1e-5)
    assert max(abs(loss - found.loss) for loss in found.shuffled_losses) > 0.01
    assert len(set(found.shuffled_losses)) == 3
    assert found.shuffle_cost == pytest.approx(np.mean(found.shuffled_losses) - found.loss)
    np.testing.assert_allclose(alike.distance_EE, 0.0, atol=1e-6)
    np.testing.assert_allclose(alike.cosine_EE, 1.0, atol=1e-6)


@pytest.mark.slow
def test_shares_and_densities_are_given_per_modality(found):
    np.testing.assert_allclose(found.share_LME.sum(2), 1.0)
    assert found.share_LME.shape == (2, 4, 4)
    np.testing.assert_allclose(found.density_LMEX.sum(3), 1.0)
    assert found.edges_X.shape == (BINS + 1,)
    np.testing.assert_allclose(np.diag(found.overlap_MM), 1.0)


def test_overlap_by_hand():
    """One layer, two experts. Text tokens at +-1, image tokens at +-1 and +-3: half of the image's overlap."""
    batch = random_batch(lengths=(8, 8))
    modality_BT = np.zeros_like(batch.modality_BT)
    modality_BT[:, 4:] = 1
    batch = dataclasses.replace(batch, modality_BT=modality_BT)
    logits_BT = np.full(modality_BT.shape, 50.0)  # padding does not count
    logits_BT[:, :8] = [-1, -1, -1, -1, -1, -1, -3, -3]
    logits_LBTE = (
        np.stack([logits_BT, -logits_BT], axis=-1)[None] + 7.0
    )  # nor does a constant added to a token's logits
    edges_X, density_LMEX = logit_densities([logits_LBTE], [batch])
    assert edges_X[-1] == pytest.approx(3.0)
    overlap_MM = density_overlap(density_LMEX)
    assert overlap_MM[0, 1] == overlap_MM[1, 0] == pytest.approx(0.5)
    assert np.isnan(overlap_MM[0, 2])


def test_similarity_by_hand():
    params = random_params(CONFIG)
    experts = params["decoder"]["moe_layers"]["moe"]["experts"]
    distance_EE, cosine_EE = expert_similarity(CONFIG, params)
    flat = np.concatenate([np.moveaxis(np.asarray(w), 1, 0).reshape(4, -1) for w in experts.values()], axis=1)
    norm = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(cosine_EE, flat @ flat.T / np.outer(norm, norm), atol=1e-5)
    between = np.linalg.norm(flat[:, None] - flat[None], axis=2) / norm[0]
    np.testing.assert_allclose(distance_EE, between, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_pictures_and_table_are_written(found, tmp_path):
    for draw in (draw_densities, draw_similarity, draw_shares):
        assert draw(found, tmp_path / f"{draw.__name__}.png").stat().st_size > 3000
    rows = dict(diagnostics_table(found).rows)
    assert rows["cost of shuffling"] == f"{found.shuffle_cost:+.3f}"
    assert "overlap of text and image" in rows

"""MoDES: layer importance, calibration of thresholds per modality to a budget, and the model's routing with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained.tiny_hub import hub_values
from pretrained.tiny_vl import patches, scene, vl_values

import anyexperts_jax as ax
from anyexperts_jax.core.batch import make_batch
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evaluate.dials import Inputs, inputs_of, seen_by
from anyexperts_jax.evaluate.modes import Modes, calibrate, divergence, layer_importance, thresholds
from anyexperts_jax.models.init import named_leaves, params_of_leaves
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.paths import EXPERTS_DOWN
from anyexperts_jax.pretrained.random_model import random_model

TOKENS_BT = np.random.default_rng(0).integers(0, 53, (2, 24))


@pytest.fixture(scope="module")
def model():
    """Returns a model of three layers, the last of which adds nothing."""
    made = random_model(hub_values("qwen3_moe"))
    leaves = named_leaves(made.params)
    down = leaves[EXPERTS_DOWN] * jnp.array([8.0, 3.0, 0.0])[:, None, None, None]
    return dataclasses.replace(made, params=params_of_leaves(made.config, {**leaves, EXPERTS_DOWN: down}))


@pytest.fixture(scope="module")
def seeing():
    return random_model(vl_values(text={"num_hidden_layers": 2}), seed=3)


@pytest.fixture(scope="module")
def shown():
    """Returns a row of 7 text tokens and 15 patches of a picture, without padding."""
    return scene([9, 8, patches((1, 6, 10)), 30, 41, 12])


def log_probs(m, tokens_BT):
    return jax.nn.log_softmax(m.logits(tokens_BT))


def test_a_layers_importance_is_the_loss_of_skipping_it(model):
    logs_BTY = log_probs(model, TOKENS_BT)
    found_L = layer_importance(model, Inputs(jnp.asarray(TOKENS_BT, jnp.int32)), logs_BTY)
    leaves, lost = named_leaves(model.params), []
    for layer in range(3):
        without = {**leaves, EXPERTS_DOWN: leaves[EXPERTS_DOWN].at[layer].set(0)}
        other = dataclasses.replace(model, params=params_of_leaves(model.config, without))
        lost.append(divergence(logs_BTY, log_probs(other, TOKENS_BT)))
    np.testing.assert_allclose(found_L, np.array(lost) / max(lost), atol=1e-5)
    assert found_L[2] < 1e-6
    assert found_L.max() == 1


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1.5, 2.25])
def test_text_realises_the_budget_and_a_useless_layer_gets_one_expert(model, budget):
    modes = calibrate(model, TOKENS_BT, budget)
    assert modes.text == modes.other
    slots_LBT = np.asarray(modes.forward(model, TOKENS_BT).trace.real_slots_BT)
    assert abs(slots_LBT.mean() - budget) < 0.1
    assert (slots_LBT[2] == 1).all()
    assert slots_LBT.max() <= 3  # MoDES only skips experts, so no token gets more than the model's own number
    assert len(np.unique(slots_LBT[:2])) > 1


def test_budgets_above_the_models_own_number_add_room(model):
    modes = calibrate(model, TOKENS_BT, 2.9)
    assert modes.most == 3
    assert calibrate(model, TOKENS_BT, 3.5).most == 4


def test_every_pair_of_thresholds_gives_the_budget(seeing, shown):
    inputs = inputs_of(seeing, shown.tokens_BT, images=shown.images)
    modality_N = np.asarray(inputs.modality_BT).reshape(-1)
    assert (modality_N == 0).sum() == 7
    seen = seen_by(seeing, inputs)
    pairs = thresholds(seen, 2.0, 3, points=4)
    assert len(pairs) == 4
    means = []
    for text, other in pairs:
        dial_N1 = np.where(modality_N == 0, text, other)[:, None]
        slots_LN = np.clip((np.asarray(seen.scores_NE) >= dial_N1).sum(axis=2), 1, 3)
        assert abs(slots_LN.mean() - 2) < 0.1
        means.append(slots_LN[:, modality_N == 0].mean())
    assert means == sorted(means)
    assert means[-1] - means[0] > 1  # text ranges from few experts to all of them


@pytest.mark.slow
def test_with_pictures_the_pair_that_changes_the_predictions_least_is_chosen(seeing, shown):
    given = {"images": shown.images}
    modes = calibrate(seeing, shown.tokens_BT, 2.0, **given, points=4)
    inputs = inputs_of(seeing, shown.tokens_BT, **given)
    logs_BTY = jax.nn.log_softmax(seeing.logits(shown.tokens_BT, **given))
    weighed = seen_by(seeing, inputs)
    weighed = weighed._replace(scores_NE=weighed.scores_NE * modes.importance_L[:, None, None])
    lost = {}
    for pair in thresholds(weighed, 2.0, 3, 4):
        one = Modes(modes.importance_L, *pair, most=3)
        output = one.forward(seeing, shown.tokens_BT, **given)
        lost[pair] = divergence(logs_BTY, jax.nn.log_softmax(output.logits_BTY))
    assert min(lost, key=lost.get) == (modes.text, modes.other)
    assert max(lost.values()) > 1.01 * min(lost.values())
    slots = np.asarray(modes.forward(seeing, shown.tokens_BT, **given).trace.real_slots_BT)
    assert abs(slots.mean() - 2) < 0.15


def test_a_threshold_is_the_modalitys_divided_by_the_layers_importance():
    modes = Modes(np.array([1.0, 0.5, 0.0], np.float32), 0.2, 0.4, 3)
    window_LBT2 = np.asarray(modes.window(jnp.array([[0, 1, 2, 3]], jnp.int32)))
    np.testing.assert_allclose(window_LBT2[0, 0, :, 0], [0.2, 0.4, 0.4, 0.4])
    np.testing.assert_allclose(window_LBT2[1, 0, :, 0], [0.4, 0.8, 0.8, 0.8])
    assert (window_LBT2[2, ..., 0] > 1).all()  # no score reaches it
    assert (window_LBT2[..., 1] == 3).all()


def test_a_window_per_layer_and_token_equals_a_window_per_layer(model):
    config = Modes(np.ones(3, np.float32), 0.1, 0.1, 3).config(model.config)
    batch = make_batch(jnp.asarray(TOKENS_BT, jnp.int32))
    run = jax.jit(lambda window: MultimodalModel(config).apply({"params": model.params}, batch, window=window))
    window_L2 = jnp.array([[0.1, 3], [0.2, 3], [0.15, 2]])
    by_layer = run(window_L2)
    by_token = run(jnp.broadcast_to(window_L2[:, None, None], (3, *TOKENS_BT.shape, 2)))
    np.testing.assert_array_equal(by_layer.trace.real_slots_BT, by_token.trace.real_slots_BT)
    np.testing.assert_array_equal(by_layer.logits_BTY, by_token.logits_BTY)


@pytest.mark.parametrize(
    ("case", "budget", "how", "message"),
    [
        ("llama", 2, {}, "MoDES: the model is dense"),
        ("qwen3_moe", 0.5, {}, "MoDES: budget=0.5 must be from 1 to 7"),
        ("qwen3_moe", 2, {"points": 1}, "MoDES: points=1 must be >= 2"),
        ("qwen3_moe", 2, {"images": [patches((1, 4, 4))]}, "reads text alone, but images are given"),
    ],
)
def test_impossible_calibrations_are_refused(case, budget, how, message):
    with pytest.raises(UserError, match=message):
        calibrate(random_model(hub_values(case)), TOKENS_BT, budget, **how)


def test_explicit_slots_are_not_calibrated(model):
    with pytest.raises(UserError, match="MoDES: the model has slots of its own"):
        calibrate(ax.attach(model, k_min=2, k_max=4), TOKENS_BT, 2)

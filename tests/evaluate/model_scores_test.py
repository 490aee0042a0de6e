"""Token scores from the router, the gradient and the embeddings, on a random model."""

import numpy as np
import pytest

from anyexperts_jax.evaluate.evaluate import Options, evaluate_trained, load_batches
from anyexperts_jax.evaluate.measure import sample_routing
from anyexperts_jax.evaluate.model_scores import model_scores
from anyexperts_jax.evaluate.trained import own_window
from evaluate.stand_in import trained


@pytest.fixture(scope="module")
def measured():
    one = trained()
    batches = load_batches(one, ["general"], "test", 4, 4)
    window = own_window(one.config.model.moe)
    sample = sample_routing(one, one.config.model, batches, window)
    return batches["general"][0], sample, model_scores(one, one.config.model, sample, batches, window)


@pytest.mark.slow
def test_gradients_are_zero_after_the_answer_is_predicted(measured):
    batch, _, scores = measured
    gradient_BT = scores["gradient norm"]
    mask_BT = np.asarray(batch.loss_mask_BT)
    last_B = mask_BT.shape[1] - 1 - np.argmax(mask_BT[:, ::-1], axis=1)
    after_BT = np.arange(mask_BT.shape[1]) > last_B[:, None]
    assert (gradient_BT[after_BT] == 0).all()
    assert (gradient_BT[mask_BT] > 0).all()


@pytest.mark.slow
def test_entropy_equals_the_routers(measured):
    batch, sample, scores = measured
    valid_BT = np.asarray(batch.valid_BT)
    entropy_BT = scores["router entropy"]
    assert (entropy_BT[valid_BT] > 0).all()
    assert (entropy_BT[valid_BT] <= np.log(10) + 1e-5).all(), "8 real and 2 virtual columns"
    assert (entropy_BT[~valid_BT] == 0).all()
    assert sample.entropy_LBT.shape == sample.importance_LBT.shape


@pytest.mark.slow
def test_equal_embeddings_have_equal_norms(measured):
    batch, _, scores = measured
    text_BT = (np.asarray(batch.modality_BT) == 0) & np.asarray(batch.valid_BT)
    by_token = {}
    for token, norm in zip(
        np.asarray(batch.tokens_BT)[text_BT].tolist(), scores["embedding norm"][text_BT].tolist(), strict=True
    ):
        assert by_token.setdefault(token, norm) == pytest.approx(norm, rel=1e-5)
    assert len(set(np.round(list(by_token.values()), 3))) > 5


@pytest.mark.slow
def test_evaluation_at_nominal_windows_with_model_baselines():
    one = trained()
    options = Options(num_examples=4, calibration_examples=4, time_rounds=1, calibrated=False, model_baselines=True)
    result = evaluate_trained(one, [3.6, 4.0], options=options)
    assert [budget.routing.window for budget in result.budgets] == [(3.0, 6.0), (3.5, 6.5)]
    assert {"router entropy", "gradient norm", "embedding norm", "contrast"} <= set(result.separations[0].baselines)

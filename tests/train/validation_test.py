import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.data.pipeline import eval_batches
from anyexperts_jax.models.config import AudioConfig
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.train.losses import answer_scores
from anyexperts_jax.train.state import TrainState
from anyexperts_jax.train.validation import Validation
from train.stand_in import DATA, MODEL, linear_apply, linear_params, run_config

STATE = TrainState(jnp.zeros((), jnp.int32), linear_params(), (), jnp.zeros((1, 5)))


@pytest.fixture(scope="module")
def record():
    encoding = dataclasses.replace(DATA.encoding, max_frames=60)
    data = dataclasses.replace(DATA, domains=("nlp", "speech"), encoding=encoding)
    config = run_config(dataclasses.replace(MODEL, audio=AudioConfig()), data, eval_examples=5)
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    return data, Validation(config, linear_apply, mesh)(STATE)


def test_scores_are_of_the_examples_alone_and_the_loss_a_mean_over_domains(record):
    data, record = record
    for name, scores in record["domains"].items():
        (batch,) = eval_batches(data, name, "validation", 8, 5)
        logits, _ = linear_apply(STATE.params, batch, None, None, None)
        rows = answer_scores(logits, batch.tokens_BT, batch.loss_mask_BT)
        assert scores["examples"] == 5
        tokens = np.asarray(rows.tokens_B)[:5].sum()
        np.testing.assert_allclose(scores["loss"], np.asarray(rows.loss_B)[:5].sum() / tokens, rtol=1e-6)
        np.testing.assert_allclose(scores["token_accuracy"], np.asarray(rows.correct_B)[:5].sum() / tokens)
    np.testing.assert_allclose(record["loss"], np.mean([s["loss"] for s in record["domains"].values()]))


def test_routing_is_over_all_domains_tokens(record):
    data, record = record
    batches = [batch for name in data.domains for batch in eval_batches(data, name, "validation", 8, 5)]
    audio = sum(int(((b.modality_BT == 2) & b.valid_BT).sum()) for b in batches)
    assert record["tokens"][2] == audio > 0
    assert record["tokens"].sum() == sum(int(b.valid_BT.sum()) for b in batches)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.nn.config import StackConfig
from anyexperts_jax.nn.stack import remat_policy
from models.small import SMALL, forward, loss_and_grad, random_batch, random_params, small, weights


@pytest.fixture(scope="module")
def kept():
    """Loss, output and gradients with nothing computed again."""
    return loss_and_grad(small(stack={"dispatch": "blocks"}))(random_params(SMALL), random_batch(), weights())


def close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize("remat", ["full", "routing", "dots"])
def test_remat_changes_neither_routing_nor_gradients(kept, remat):
    config = small(stack={"dispatch": "blocks", "remat": remat})
    (loss, output), grads = loss_and_grad(config)(random_params(SMALL), random_batch(), weights())
    (kept_loss, kept_output), kept_grads = kept
    np.testing.assert_array_equal(output.trace.expert_ids_BTK, kept_output.trace.expert_ids_BTK)
    np.testing.assert_allclose(loss, kept_loss, rtol=1e-6)
    close(grads, kept_grads)


def test_unknown_remat_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="remat='ful' is unknown; valid: none, full, routing, dots"):
        StackConfig(remat="ful")
    with pytest.raises(UserError, match="remat='none' is unknown; valid: full, routing, dots"):
        remat_policy("none")


def test_an_unrolled_scan_is_the_same_function():
    params, batch = random_params(SMALL), random_batch()
    unrolled = forward(small(stack={"scan_unroll": 2}))(params, batch)
    scanned = forward(SMALL)(params, batch)
    close(unrolled.logits_BTY, scanned.logits_BTY)
    np.testing.assert_array_equal(unrolled.trace.expert_ids_BTK, scanned.trace.expert_ids_BTK)


def test_layers_of_the_scan_have_their_own_parameters_and_biases():
    config = small(moe={"expert_bias": True})
    params, batch = random_params(config), random_batch()
    bias_LC = jnp.zeros((2, 8)).at[0, 1].set(100.0).at[1, 4].set(100.0)
    ids = np.asarray(forward(config)(params, batch, bias_LC).trace.expert_ids_BTK)[:, batch.valid_BT]
    assert (ids[0] == 1).any(-1).all()
    assert (ids[1] == 4).any(-1).all()
    assert not (ids[1] == 1).any(-1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_dense_layers": 4}, r"num_dense_layers=4 must be in \[0, num_layers=4\)"),
        ({"d_model": 0}, "d_model=0 must be >= 1"),
        ({"dtype": "float16"}, "dtype='float16' is unknown; valid: float32, bfloat16"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 must be >= 0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be > 0"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(StackConfig(), **fields)

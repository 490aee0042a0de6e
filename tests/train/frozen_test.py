import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anyexperts_jax.train.frozen import overlay, select, train_only
from anyexperts_jax.train.optim import OptimConfig, make_optimizer
from anyexperts_jax.train.state import TrainState
from anyexperts_jax.train.step import make_train_step
from train.stand_in import linear_apply, linear_params, random_batch, run_config

PARAMS = {"a": {"w": jnp.arange(3.0), "b": jnp.ones(2)}, "c": jnp.zeros(4)}
TRAINABLE = {"a": {"w": True, "b": False}, "c": False}


def test_select_and_overlay_are_inverse_and_none_means_all():
    chosen = select(PARAMS, TRAINABLE)
    assert chosen["a"]["b"] is None
    assert chosen["c"] is None
    whole = overlay({"a": {"w": jnp.full(3, 7.0), "b": None}, "c": None}, PARAMS)
    np.testing.assert_array_equal(whole["a"]["w"], 7.0)
    assert whole["c"] is PARAMS["c"]
    assert select(PARAMS, None) is PARAMS


def test_the_optimiser_has_state_and_updates_for_what_trains_alone():
    optimizer = train_only(optax.adam(0.1), TRAINABLE)
    state = optimizer.init(PARAMS)
    assert [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim] == [(3,), (3,)]
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes its integer count with floats
        updates, _ = optimizer.update(select(PARAMS, TRAINABLE), state, PARAMS)
    assert updates["c"] is None
    assert updates["a"]["w"].shape == (3,)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_changes_no_bit_of_what_is_frozen_and_trains_the_rest(accumulation):
    config = run_config(optim=OptimConfig(lr=0.1, warmup_steps=0, weight_decay=0.5), accumulation=accumulation)
    params = {**linear_params(), "still": jnp.asarray([-0.0, 0.0, 1e-30, 3.0])}
    trainable = {"table": True, "still": False}
    axes = {"table": ("vocab", "embed"), "still": None}

    def apply(params, batch, bias, key, window):
        logits, trace = linear_apply(params["table"], batch, bias, None, window)
        return logits + params["still"].sum(), trace

    optimizer = train_only(make_optimizer(config.optim, axes), trainable)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.zeros((1, 5)))
    step = jax.jit(make_train_step(config, optimizer, apply, trainable))
    after, report = step(state, random_batch())
    assert np.asarray(after.params["still"]).tobytes() == np.asarray(params["still"]).tobytes()
    assert float(jnp.abs(after.params["table"] - params["table"]).max()) > 0.01
    assert float(report.scalars["grad_norm"]) > 0
    poisoned = dataclasses.replace(state, params={**params, "still": params["still"].at[0].set(jnp.nan)})
    assert not bool(step(poisoned, random_batch())[1].finite)

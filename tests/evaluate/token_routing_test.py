"""The routing of tokens agrees with the model's own trace, and drops agree with buffers counted by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.capacity import rows_per_expert
from anyexperts_jax.evaluate.evaluate import load_batches
from anyexperts_jax.evaluate.measure import run_at
from anyexperts_jax.evaluate.plans import plan_of
from anyexperts_jax.evaluate.token_routing import trace_batch
from anyexperts_jax.evaluate.trained import own_window
from anyexperts_jax.models.presets import dense_twin
from evaluate.buffers_test import model_of as buffered
from evaluate.buffers_test import on_four_devices
from evaluate.stand_in import trained

ROWS = 3


@pytest.fixture(scope="module")
def one():
    return trained(buffered("capacity"))


@pytest.fixture(scope="module")
def batch(one):
    return load_batches(one, ("general",), "test", ROWS, ROWS)["general"][0]


@pytest.fixture(scope="module")
def routing(one, batch):
    return trace_batch(one, batch)


@pytest.fixture(scope="module")
def trace(one, batch):
    return run_at(one, one.config.model, batch, own_window(one.config.model.moe)).trace


def test_token_routing_equals_the_models_trace(one, batch, routing, trace):
    np.testing.assert_array_equal(routing.expert_ids_LBTK, trace.expert_ids_BTK)
    np.testing.assert_array_equal(routing.real_slots_LBT + routing.virtual_slots_LBT, routing.slots_LBT)
    np.testing.assert_allclose(routing.importance_LBT, trace.importance_BT, atol=1e-6)
    live_LBTK = routing.expert_ids_LBTK < one.config.model.moe.num_experts
    np.testing.assert_array_equal(live_LBTK.sum(-1), routing.real_slots_LBT)
    assert (routing.weights_LBTK[live_LBTK] > 0).all()
    assert (routing.weights_LBTK[~live_LBTK] == 0).all()
    assert (routing.slots_LBT[:, ~batch.valid_BT] == 0).all()
    assert routing.window == own_window(one.config.model.moe)


def test_slot_weights_of_every_token_have_the_same_sum(routing):
    """Importance-aware weights are normalised, so their sum is the same for every token, virtual slots included."""
    total_LBT = routing.weights_LBTK.sum(-1) + routing.virtual_weight_LBT
    np.testing.assert_allclose(total_LBT[:, routing.valid_BT], 1, rtol=1e-5)


def test_full_buffers_drop_the_latest_positions(one, routing, trace):
    model = one.config.model
    layers, rows, length, _ = routing.expert_ids_LBTK.shape
    assert routing.dropped == round(float(trace.metrics["dropped"].sum())) > 0
    room = rows_per_expert(
        plan_of(model, jax.tree.map(lambda leaf: leaf[0], trace)).spec,
        model.stack.execution.capacity_factor,
        rows * length,
    )
    for layer in range(layers):
        taken = np.zeros(model.moe.num_experts, int)
        for position in range(length):
            for row in range(rows):
                ids_K = routing.expert_ids_LBTK[layer, row, position]
                for k in np.flatnonzero(ids_K < model.moe.num_experts):
                    full = taken[ids_K[k]] >= room
                    assert routing.dropped_LBTK[layer, row, position, k] == full
                    taken[ids_K[k]] += 1


def test_the_experts_of_a_token_are_listed(routing):
    layer, row, position = (int(i[0]) for i in np.nonzero(routing.dropped_LBTK.any(-1)))
    found = routing.experts(layer, row, position)
    dropped_K = routing.dropped_LBTK[layer, row, position]
    assert len(found) == routing.real_slots_LBT[layer, row, position] - dropped_K.sum()
    assert not set(found) & set(routing.expert_ids_LBTK[layer, row, position][dropped_K].tolist())
    assert routing.experts(0, 0, int((~routing.valid_BT[0]).nonzero()[0][0])) == {}


@pytest.mark.slow
def test_on_a_mesh_rows_are_padded_and_drops_are_the_exchanges(batch):
    there = on_four_devices(trained(buffered("exchange")))
    found = trace_batch(there, batch)
    assert found.expert_ids_LBTK.shape[1] == ROWS
    whole = load_batches(there, ("general",), "test", ROWS, ROWS)["general"][0]
    dropped = run_at(there, there.config.model, whole, own_window(there.config.model.moe)).trace.metrics["dropped"]
    assert found.dropped == round(float(dropped.sum())) > 0


def test_untraceable_requests_are_refused(one, batch):
    with pytest.raises(UserError, match="target_real=999 is out of reach"):
        trace_batch(one, batch, 999)
    dense = dataclasses.replace(one.config, model=dense_twin(one.config.model))
    with pytest.raises(UserError, match="nothing to trace: the run's model is dense"):
        trace_batch(dataclasses.replace(one, config=dense), batch)

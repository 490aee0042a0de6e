"""Dispatch buffers are sized by the current window, so overflow does not depend on the other budgets measured."""

import dataclasses

import jax
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.evaluate import evaluate as evaluation
from anyexperts_jax.evaluate.evaluate import Options, evaluate_trained, load_batches
from anyexperts_jax.evaluate.measure import sample_routing
from anyexperts_jax.evaluate.results import BudgetTime
from anyexperts_jax.evaluate.trained import at_window, own_window, with_room
from anyexperts_jax.models.init import logical_axes
from anyexperts_jax.routing.budget import shift_budget
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.specs import param_shardings, replicated
from evaluate.stand_in import MODEL, trained

OPTIONS = Options(num_examples=2, calibration_examples=2, time_rounds=1, calibrated=False)
MOE = AnyExpertsConfig(num_experts=24, num_virtual=6, k_min=4, k_max=8)
NO_TIME = BudgetTime(reference=4.8, forward=1.0, layer=1.0, forward_seconds=0.0, layer_seconds=0.0)
FACTORS = {"capacity": 0.9, "exchange": 0.65, "blocks": 0.65}


def model_of(dispatch):
    stack = dataclasses.replace(MODEL.stack, execution=Execution(dispatch, capacity_factor=FACTORS[dispatch]))
    return dataclasses.replace(MODEL, stack=stack, moe=MOE)


def on_four_devices(one):
    mesh = make_mesh(MeshConfig(data=1, expert=4), jax.devices()[:4])
    shardings = param_shardings(mesh, logical_axes(one.config.model), one.params)
    bias_LC = jax.device_put(one.router_bias_LC, replicated(mesh))
    return dataclasses.replace(one, params=jax.device_put(one.params, shardings), router_bias_LC=bias_LC)


@pytest.mark.slow
def test_a_budget_drops_the_same_tokens_alone_and_with_others(monkeypatch):
    """Runs the whole command except answers and times, which drop nothing and take long to compile."""
    monkeypatch.setattr(evaluation, "predict", lambda trained, model, batch, *how: [""] * len(batch.tokens_BT))
    monkeypatch.setattr(evaluation, "time_budgets", lambda *how: dict.fromkeys(how[3], NO_TIME))
    one = trained(model_of("capacity"))
    alone, beside = (
        evaluate_trained(one, budgets, ("nlp",), options=OPTIONS).budgets for budgets in ((4.8,), (4.8, 8.0, 12.0))
    )
    dropped = [found.routing.dropped for found in beside]
    assert min(dropped) > 0
    assert alone[0].routing.dropped == dropped[0]
    assert alone[0].realised == beside[0].realised


def test_an_exchange_drops_the_same_tokens_with_more_room():
    one = on_four_devices(trained(model_of("exchange")))
    window = own_window(shift_budget(MOE, 4.8))
    batches = load_batches(one, ("general",), "test", 4, 4)
    roomy = with_room(one.config.model, own_window(shift_budget(MOE, 12.0))[1])
    assert roomy.moe.expected_real_slots > 2 * MOE.expected_real_slots
    few, many = (sample_routing(one, model, batches, window).dropped for model in (one.config.model, roomy))
    assert few == many > 0


def test_a_budget_that_overflows_every_buffer_is_refused_before_measuring():
    one, notes = trained(model_of("exchange")), []
    with pytest.raises(UserError, match=r"capacity_factor=0\.65 gives room for 5\.2 real slots per token, fewer than"):
        evaluate_trained(one, (4.8, 8.0), ("nlp",), options=OPTIONS, note=notes.append)
    assert notes == []


@pytest.mark.parametrize(("dispatch", "own"), [("capacity", True), ("exchange", True), ("blocks", False)])
def test_only_dispatch_with_buffers_compiles_a_program_per_budget(dispatch, own):
    model = model_of(dispatch)
    found = at_window(model, (5.5, 9.5))
    assert (found.moe.k_min, found.moe.k_max) == ((5.5, 9.5) if own else (4, 8))
    assert found.stack == model.stack

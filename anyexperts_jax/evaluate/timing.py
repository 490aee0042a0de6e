"""Measures time against the budget: of the whole model, and of one MoE layer with each budget's own routing.

One program serves all budgets, so only the data differ; if dispatch has buffers, each budget has its own program, with
buffers of its size. Runs are interleaved (A B A B), and medians are reported.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.dispatch.apply import apply_plan
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.evaluate.measure import Window, forward, window_array
from anyexperts_jax.evaluate.plans import plan_of
from anyexperts_jax.evaluate.results import BudgetTime
from anyexperts_jax.evaluate.trained import Trained, at_window
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.sharding.placement import Placement, is_split, placement_of


def time_budgets(
    trained: Trained, model: ModelConfig, batch: Batch, windows: Mapping[float, Window], rounds: int = 9
) -> dict[float, BudgetTime]:
    """Times each budget's window on `batch`; `model` is the run's, with room for all windows.

    The reference, whose time is 1, is the budget nearest to the one the run was trained with.
    """
    placement = placement_of(trained.params)
    arguments = (trained.params, trained.router_bias_LC, trained.place(batch))
    own = trained.config.model.moe.expected_real_slots
    reference = min(windows, key=lambda budget: abs(budget - own))
    whole, layer = {}, {}
    for budget, window in windows.items():
        own_model = at_window(model, window)
        whole[budget] = functools.partial(forward, own_model, *arguments, window_array(window))
        layer[budget] = _layer(own_model, whole[budget]().trace, placement)
    whole_seconds, layer_seconds = interleaved(whole, rounds), interleaved(layer, rounds)
    return {
        budget: BudgetTime(
            reference=reference,
            forward=whole_seconds[budget] / whole_seconds[reference],
            layer=layer_seconds[budget] / layer_seconds[reference],
            forward_seconds=whole_seconds[budget],
            layer_seconds=layer_seconds[budget],
        )
        for budget in windows
    }


def interleaved(calls: Mapping[float, Callable[[], Any]], rounds: int) -> dict[float, float]:
    """Returns the median seconds of each call, in `rounds` interleaved rounds after a warm-up of each."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[float, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _layer(model: ModelConfig, trace: Any, placement: Placement) -> Callable[[], Array]:
    """Returns a call of dispatch, experts and combine of the last MoE layer, with the routing of this trace.

    Time does not depend on values, so activations and weights are random, and combine weights are equal.
    """
    plan = plan_of(model, jax.tree.map(lambda leaf: leaf[-1], trace))
    stack, E = model.stack, model.moe.num_experts
    D, F, N = stack.d_model, stack.expert_d_ff, plan.slots_N.shape[0]
    rng = np.random.default_rng(0)
    shapes: Sequence[tuple[int, ...]] = ((N, D), (E, D, F), (E, D, F), (E, F, D))
    x_ND, *weights = (jnp.asarray(rng.standard_normal(shape), stack.dtype) for shape in shapes)
    experts = ExpertWeights(*weights)
    if is_split(placement):
        x_ND, experts = jax.device_put((x_ND, experts), _layer_shardings(placement))
    return functools.partial(_apply, (stack.execution, placement), x_ND, plan, experts)


def _layer_shardings(placement: Placement) -> Any:
    """Returns the shardings of a layer's tokens and weights on a mesh."""
    spec, wide = placement.rules.spec, ("expert", "embed", "expert_mlp")
    axes = (("batch",), wide, wide, ("expert", "expert_mlp", "embed"))
    places: list[Any] = [NamedSharding(placement.mesh, spec(names)) for names in axes]
    return places[0], ExpertWeights(*places[1:])


@functools.partial(jax.jit, static_argnums=0)
def _apply(static: tuple[Execution, Placement], x_ND: Array, plan: RoutingPlan, experts: ExpertWeights) -> Array:
    return apply_plan(x_ND, plan, experts, *static)[0]

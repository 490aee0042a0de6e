"""Traces the routing of every token of a batch in every MoE layer, including combine weights and drops."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy import ndarray

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.data.batches import pad_rows
from anyexperts_jax.dispatch.apply import apply_plan
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.evaluate.measure import Window, window_array
from anyexperts_jax.evaluate.plans import plan_of
from anyexperts_jax.evaluate.trained import Trained, at_window, own_window, require_experts, with_room
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.paths import moe_probe
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.routing.budget import shift_budget
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.sharding.placement import Placement


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRouting:
    """The routing of B sequences of T positions in L MoE layers with E real experts, as NumPy arrays on the host.

    K is the most slots that a token can have; slots without a real expert hold id E and weight 0. Padding has none.
    """

    expert_ids_LBTK: Int[ndarray, "L B T K"]
    weights_LBTK: Float[ndarray, "L B T K"]  # combine weight of each real slot
    dropped_LBTK: Bool[ndarray, "L B T K"]  # real slots that did not fit into the buffers of dispatch
    slots_LBT: Int[ndarray, "L B T"]  # of the token, real and virtual
    real_slots_LBT: Int[ndarray, "L B T"]
    virtual_slots_LBT: Int[ndarray, "L B T"]
    virtual_weight_LBT: Float[ndarray, "L B T"]  # combine weight of all virtual slots of the token
    importance_LBT: Float[ndarray, "L B T"]  # in (0, 1)
    valid_BT: Bool[ndarray, "B T"]  # False at padding
    modality_BT: Int[ndarray, "B T"]  # core.modality.Modality
    window: tuple[float, float]  # slots a token may have, (k_min, k_max)

    @property
    def dropped(self) -> int:
        """Number of real slots that did not fit, over all layers."""
        return int(self.dropped_LBTK.sum())

    def experts(self, layer: int, row: int, position: int) -> dict[int, float]:
        """Returns the combine weights of the experts that computed one token, by expert."""
        at = (layer, row, position)
        live_K = (self.weights_LBTK[at] > 0) & ~self.dropped_LBTK[at]
        pairs = zip(self.expert_ids_LBTK[at][live_K], self.weights_LBTK[at][live_K], strict=True)
        return {int(expert): float(weight) for expert, weight in pairs}


def trace_batch(trained: Trained, batch: Batch, budget: float | None = None) -> TokenRouting:
    """Runs the model on a batch and returns its routing and drops.

    Args:
      batch: may have any number of rows; on a mesh padding rows are added and cut off again.
      budget: nominal real experts per token (`routing.budget.shift_budget`); None: the window used in training.

    Raises:
      UserError: if the model is dense, the batch does not fit it, or the budget is out of reach.
    """
    require(isinstance(batch, Batch), f"batch is a {type(batch).__name__}; it must be a Batch")
    require_experts(trained.config, "nothing to trace")
    moe = trained.config.model.moe
    window = own_window(moe if budget is None else shift_budget(moe, budget))
    model = at_window(with_room(trained.config.model, window[1]), window)
    rows = batch.tokens_BT.shape[0]
    placed = trained.place(pad_rows(batch, trained.whole_rows(rows), trained.tokenizer))
    traced = _trace((model, trained.placement), trained.params, trained.router_bias_LC, placed, window_array(window))
    trace = traced[0]
    if float(trace.metrics["dropped"].sum()) > 0:
        dropped = np.stack([_dropped(trained, model, trace, layer) for layer in range(len(trace.slots_BT))])
    else:
        dropped = np.zeros(trace.expert_ids_BTK.shape, bool)
    return _on_host(jax.device_get(traced), dropped, batch, window)


@functools.partial(jax.jit, static_argnums=0)
def _trace(
    static: tuple[ModelConfig, Placement], params: Any, router_bias_LC: Array, batch: Batch, window: Array
) -> tuple[RoutingTrace, Array, Array]:
    """Returns the trace, the combine weights [L, B, T, K] and those of all virtual slots [L, B, T]."""
    options: dict[str, Any] = {"router_bias_LC": router_bias_LC, "window": window, "mutable": ["probe"]}
    output, probed = MultimodalModel(*static).apply({"params": params}, batch, **options)
    probe = moe_probe(probed)
    return output.trace, probe["weights_BTK"], probe["virtual_weight_BT"]


def _on_host(traced: Any, dropped_LBTK: ndarray, batch: Batch, window: Window) -> TokenRouting:
    trace, weights_LBTK, virtual_weight_LBT = traced
    rows = batch.tokens_BT.shape[0]
    cut = lambda values: np.asarray(values)[:, :rows]  # noqa: E731
    return TokenRouting(
        expert_ids_LBTK=cut(trace.expert_ids_BTK),
        weights_LBTK=cut(weights_LBTK),
        dropped_LBTK=cut(dropped_LBTK),
        slots_LBT=cut(trace.slots_BT),
        real_slots_LBT=cut(trace.real_slots_BT),
        virtual_slots_LBT=cut(trace.virtual_slots_BT),
        virtual_weight_LBT=cut(virtual_weight_LBT),
        importance_LBT=cut(trace.importance_BT),
        valid_BT=np.asarray(batch.valid_BT),
        modality_BT=np.asarray(batch.modality_BT),
        window=(float(window[0]), float(window[1])),
    )


def _dropped(trained: Trained, model: ModelConfig, trace: RoutingTrace, layer: int) -> Bool[ndarray, "B T K"]:
    """Finds the slots of one layer that were dropped: those whose weight the output does not depend on.

    Dispatch runs once more on the layer's own routing, with tiny experts whose outputs are all equal, and is
    differentiated by the combine weights. This works for any dispatcher, also a user's own.
    """
    plan = plan_of(model, jax.tree.map(lambda leaf: leaf[layer], trace))
    execution = dataclasses.replace(model.stack.execution, implementation="xla")
    served_NK = np.asarray(_dependence((execution, trained.placement), plan)) != 0
    real_NK = np.asarray(plan.expert_ids_NK) < model.moe.num_experts
    return (real_NK & ~served_NK).reshape(trace.expert_ids_BTK.shape[1:])


@functools.partial(jax.jit, static_argnums=0)
def _dependence(static: tuple[Execution, Placement], plan: RoutingPlan) -> Float[Array, "N K"]:
    """Returns the derivative of the sum of all outputs by each combine weight."""
    placement = static[1]
    E, F = plan.spec.num_experts, placement.mesh.size  # a width that every mesh axis divides
    experts = ExpertWeights(jnp.ones((E, F, F)), jnp.ones((E, F, F)), jnp.ones((E, F, F)))
    x_ND = jnp.ones((plan.slots_N.shape[0], F))

    def total(weights_NK: Array) -> Array:
        return apply_plan(x_ND, dataclasses.replace(plan, weights_NK=weights_NK), experts, *static)[0].sum()

    return jax.grad(total)(plan.weights_NK)

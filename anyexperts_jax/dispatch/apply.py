"""`moe_apply`: the plan carried out on the tokens."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.registries import DISPATCHERS
from anyexperts_jax.dispatch.base import DispatchStats, add_virtual_output
from anyexperts_jax.dispatch.execution import Execution, resolve_implementation
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.sharding.placement import Placement


def moe_apply(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    **how: Any,
) -> Float[Array, "N D"]:
    """`moe_apply_stats` without the stats."""
    return moe_apply_stats(x_ND, plan, w_gate_EDF, w_up_EDF, w_down_EFD, **how)[0]


def moe_apply_stats(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    placement: Placement | None = None,
    num_sequences: int | None = None,
    **execution: Any,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(sum over each token's slots of weight * expert(x) or, for virtual slots, weight * x; stats).

    Differentiable in x, the weights, `plan.weights_NK` and `plan.virtual_weight_N`. Accumulates in float32, returns
    x's dtype.

    Args:
      placement: the mesh the arrays lie on; None: one device.
      num_sequences: N = num_sequences * T, sequence after sequence; overflow takes the latest positions of all. None:
        as `route` was told.
      execution: fields of `Execution`: dispatch="capacity", implementation="xla", residuals="recomputed" and so on.

    Raises:
      UserError: an unknown field or value of `Execution`, or shapes, dtypes or sizes that do not fit.
    """
    fields = [field.name for field in dataclasses.fields(Execution)]
    unknown = [name for name in execution if name not in fields]
    require(not unknown, f"unknown argument {', '.join(unknown)}; valid: placement, num_sequences, {', '.join(fields)}")
    if num_sequences is not None:
        plan = dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, num_sequences=num_sequences))
    experts = ExpertWeights(w_gate_EDF, w_up_EDF, w_down_EFD)
    return apply_plan(x_ND, plan, experts, Execution(**execution), placement)


def apply_plan(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """What `moe_apply_stats` documents, for those who hold the weights and the execution as one value each."""
    _check(x_ND, plan, experts)
    execution = resolve_implementation(execution, placement, x_ND.dtype)
    y_ND, stats = DISPATCHERS[execution.dispatch](x_ND, plan, experts, execution, placement)
    return add_virtual_output(y_ND, x_ND, plan), stats


def _check(x_ND: Array, plan: RoutingPlan, experts: ExpertWeights) -> None:
    require(x_ND.ndim == 2, f"x_ND has shape {x_ND.shape}; it must be [N, D]")
    tokens, planned, sequences = x_ND.shape[0], plan.expert_ids_NK.shape[0], plan.spec.num_sequences
    require(tokens == planned, f"x_ND holds {tokens} tokens, the plan {planned}")
    held = experts.gate_EDF.shape[0]
    require(
        held == plan.spec.num_experts, f"the weights hold {held} experts, the plan routes to {plan.spec.num_experts}"
    )
    require(sequences >= 1 and tokens % sequences == 0, f"num_sequences={sequences} must divide the {tokens} tokens")

"""`moe_apply`: applies a routing plan to the tokens."""

import dataclasses
from numbers import Integral
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.arrays import as_array, as_floats, require_ids, vary_tree_alike
from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.errors import require, shown
from anyexperts_jax.core.registries import DISPATCHERS
from anyexperts_jax.dispatch.base import DispatchStats, add_virtual_output
from anyexperts_jax.dispatch.execution import Execution, resolve_implementation
from anyexperts_jax.ops._checks import check_expert_weights
from anyexperts_jax.ops.experts import ExpertWeights, as_expert_weights
from anyexperts_jax.routing.plan import DISPATCHED, PlanSpec, RoutingPlan
from anyexperts_jax.sharding.placement import Placement


def moe_apply(
    x_ND: Float[ArrayLike, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[ArrayLike, "E D F"],
    w_up_EDF: Float[ArrayLike, "E D F"],
    w_down_EFD: Float[ArrayLike, "E F D"],
    **how: Any,
) -> Float[Array, "N D"]:
    """`moe_apply_stats` without the stats.

    Example:
        >>> import anyexperts_jax as ax, numpy as np
        >>> rng, config = np.random.default_rng(0), ax.AnyExpertsConfig(num_experts=4, num_virtual=1, k_min=1, k_max=3)
        >>> plan = ax.route(config, rng.normal(size=(16, 5)), rng.normal(size=16))
        >>> gate_EDF, up_EDF, down_EFD = rng.normal(size=(3, 4, 8, 8)).astype("float32")
        >>> ax.moe_apply(rng.normal(size=(16, 8)), plan, gate_EDF, up_EDF, down_EFD).shape
        (16, 8)
    """
    return moe_apply_stats(x_ND, plan, w_gate_EDF, w_up_EDF, w_down_EFD, **how)[0]


def moe_apply_stats(
    x_ND: Float[ArrayLike, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[ArrayLike, "E D F"],
    w_up_EDF: Float[ArrayLike, "E D F"],
    w_down_EFD: Float[ArrayLike, "E F D"],
    *,
    placement: Placement | None = None,
    num_sequences: int | None = None,
    **execution: Any,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """Returns (y_ND, stats): y sums weight * expert(x) over a token's real slots, and weight * x over its virtual
    slots.

    Differentiable in x, the experts' weights, `plan.weights_NK` and `plan.virtual_weight_N`. Accumulates in float32 and
    returns x's dtype. All arrays, including the plan's, may be JAX's or NumPy's of any layout.

    Args:
      placement: the mesh the arrays lie on; None: one device.
      num_sequences: N = num_sequences * T, sequence after sequence; overflow drops the latest positions of all
        sequences first. None: the number that `route` was given.
      execution: fields of `Execution`: dispatch="capacity", implementation="xla", residuals="recomputed" and so on.

    Raises:
      UserError: for an unknown field or value of `Execution`, and for shapes, dtypes or sizes that do not fit.

    Example:
        >>> import anyexperts_jax as ax, numpy as np
        >>> rng, config = np.random.default_rng(0), ax.AnyExpertsConfig(num_experts=4, num_virtual=1, k_min=1, k_max=3)
        >>> plan = ax.route(config, rng.normal(size=(16, 5)), rng.normal(size=16))
        >>> gate_EDF, up_EDF, down_EFD = rng.normal(size=(3, 4, 8, 8)).astype("float32")
        >>> y_ND, stats = ax.moe_apply_stats(rng.normal(size=(16, 8)), plan, gate_EDF, up_EDF, down_EFD)
        >>> int(stats.dropped)
        0
    """
    fields = [field.name for field in dataclasses.fields(Execution)]
    unknown = [name for name in execution if name not in fields]
    require(not unknown, f"unknown argument {', '.join(unknown)}; valid: placement, num_sequences, {', '.join(fields)}")
    if num_sequences is not None:
        require(isinstance(num_sequences, Integral), f"num_sequences={shown(num_sequences)} must be a whole number")
    experts = (w_gate_EDF, w_up_EDF, w_down_EFD)
    return _apply((x_ND, plan, experts), Execution(**execution), placement, num_sequences)


def apply_plan(
    x_ND: Float[ArrayLike, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """`moe_apply_stats` for callers that hold the weights and the execution as one value each.

    Example:
        >>> import anyexperts_jax as ax, numpy as np
        >>> rng, config = np.random.default_rng(0), ax.AnyExpertsConfig(num_experts=4, num_virtual=1, k_min=1, k_max=3)
        >>> plan = ax.route(config, rng.normal(size=(16, 5)), rng.normal(size=16))
        >>> gate_EDF, up_EDF, down_EFD = rng.normal(size=(3, 4, 8, 8)).astype("float32")
        >>> experts, how = ax.ExpertWeights(gate_EDF, up_EDF, down_EFD), ax.Execution("blocks", residuals="recomputed")
        >>> y_ND, stats = ax.apply_plan(rng.normal(size=(16, 8)), plan, experts, how)
        >>> y_ND.shape, int(stats.dropped)
        ((16, 8), 0)
    """
    require(isinstance(execution, Execution), f"execution={shown(execution)} must be an Execution")
    return _apply((x_ND, plan, experts), execution, placement)


def _apply(
    given: tuple[Any, Any, Any], execution: Execution, placement: Placement | None, num_sequences: int | None = None
) -> tuple[Array, DispatchStats]:
    """`apply_plan` on (x_ND, plan, experts) as the caller gave them, before any conversion."""
    x_ND, plan, experts = as_floats("x_ND", given[0]), given[1], as_expert_weights(given[2])
    require(isinstance(plan, RoutingPlan), f"plan is a {type(plan).__name__}; it must be a RoutingPlan, as route gives")
    spec = plan.spec if num_sequences is None else dataclasses.replace(plan.spec, num_sequences=num_sequences)
    arrays = [as_array(f"plan.{name}", getattr(plan, name)) for name in DISPATCHED]
    _check(x_ND, arrays, spec, experts)
    x_ND, arrays, experts = vary_tree_alike((x_ND, arrays, experts))
    plan = dataclasses.replace(plan, spec=spec, **dict(zip(DISPATCHED, arrays, strict=True)))
    execution = resolve_implementation(execution, placement, x_ND.dtype)
    y_ND, stats = DISPATCHERS[execution.dispatch](x_ND, plan, experts, execution, placement)
    return add_virtual_output(y_ND, x_ND, plan), stats


def _check(x_ND: Array, arrays: list[Array], spec: PlanSpec, experts: ExpertWeights) -> None:
    require(x_ND.ndim == 2, f"x_ND has shape {x_ND.shape}; it must be [N, D]")
    ids_NK, weights_NK, virtual_weight_N = arrays
    require(ids_NK.ndim == 2, f"plan.expert_ids_NK has shape {ids_NK.shape}; it must be [N, K]")
    require_ids("plan.expert_ids_NK", ids_NK, spec.num_experts + 1, "ids are those of the experts, or E for none")
    tokens, planned, sequences = x_ND.shape[0], ids_NK.shape[0], spec.num_sequences
    require(tokens == planned, f"x_ND holds {tokens} tokens, the plan {planned}")
    for name, array, shape in (
        ("weights_NK", weights_NK, ids_NK.shape),
        ("virtual_weight_N", virtual_weight_N, ids_NK.shape[:1]),
    ):
        fits = array.shape == shape and jnp.issubdtype(array.dtype, jnp.floating)
        require(fits, f"plan.{name} is {array.dtype}{list(array.shape)}; it must hold floats, {list(shape)}")
    check_expert_weights(x_ND, *experts)
    held = experts.gate_EDF.shape[0]
    require(held == spec.num_experts, f"the weights hold {held} experts, the plan routes to {spec.num_experts}")
    require(sequences >= 1 and tokens % sequences == 0, f"num_sequences={sequences} must divide the {tokens} tokens")

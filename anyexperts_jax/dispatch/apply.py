"""`moe_apply`: the plan carried out on the tokens."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.dispatch.base import DispatchStats, add_virtual_output
from anyexperts_jax.dispatch.blocks import apply_blocks
from anyexperts_jax.dispatch.capacity import apply_capacity, rows_per_expert
from anyexperts_jax.dispatch.dense import apply_dense
from anyexperts_jax.routing.plan import RoutingPlan

DISPATCHES = ("blocks", "capacity", "dense", "exchange")


def moe_apply(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    dispatch: str = "blocks",
    implementation: str | None = None,
    *,
    capacity: int | None = None,
    num_sequences: int = 1,
    residuals: str = "saved",
) -> Float[Array, "N D"]:
    """`moe_apply_stats` without the stats."""
    y_ND, _ = moe_apply_stats(
        x_ND,
        plan,
        w_gate_EDF,
        w_up_EDF,
        w_down_EFD,
        dispatch,
        implementation,
        capacity=capacity,
        num_sequences=num_sequences,
        residuals=residuals,
    )
    return y_ND


def moe_apply_stats(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    dispatch: str = "blocks",
    implementation: str | None = None,
    *,
    capacity: int | None = None,
    num_sequences: int = 1,
    residuals: str = "saved",
    place_buffers: Callable[[Array], Array] = lambda x_ECD: x_ECD,
    run_blocks: Callable[..., tuple[Array, DispatchStats]] | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """(sum over each token's slots of weight * expert(x) or, for virtual slots, weight * x; stats).

    Differentiable in x, the weights, `plan.weights_NK` and `plan.virtual_weight_N`. Accumulates in float32, returns
    x's dtype.

    Args:
      dispatch: "blocks", dropless on one shard; "capacity", buffers sized by the plan's budget, which shard;
        "dense", the oracle; "exchange" is "blocks" here, on one shard, and between shards what
        `sharding.expert_parallel.moe_exchange_stats` does.
      implementation: of the expert op; None picks.
      capacity: rows of an expert's buffer in place of the budget's, for "capacity" alone.
      num_sequences: N = num_sequences * T, sequence after sequence; overflow takes the latest positions of all.
      residuals: "saved" keeps gate and up of the rows for the backward pass, "recomputed" computes them again.
      place_buffers: `place` of `capacity.apply_capacity`; on a mesh, `sharding.activations.split_buffers`.
      run_blocks: in place of `blocks.apply_blocks`; on a mesh, `sharding.blocks.split_blocks`.

    Raises:
      UserError: an unknown dispatch, implementation or residuals, or shapes, dtypes or sizes that do not fit.
    """
    require_one_of("dispatch", dispatch, DISPATCHES)
    _check(x_ND, plan, w_gate_EDF, dispatch, capacity, num_sequences)
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    how: dict[str, Any] = {"implementation": implementation, "residuals": residuals}
    run_blocks = apply_blocks if run_blocks is None else run_blocks
    if dispatch == "dense":
        y_ND, stats = apply_dense(x_ND, plan, *weights, **how)
    elif dispatch in ("blocks", "exchange"):
        y_ND, stats = run_blocks(x_ND, plan, *weights, **how)
    else:
        rows = rows_per_expert(plan.spec, x_ND.shape[0]) if capacity is None else min(capacity, x_ND.shape[0])
        size: dict[str, Any] = {"capacity": rows, "num_sequences": num_sequences}
        y_ND, stats = apply_capacity(x_ND, plan, *weights, **size, **how, place=place_buffers)
        if plan.spec.overflow == "fallback":
            y_ND, stats = _where_none_dropped(y_ND, stats, lambda: run_blocks(x_ND, plan, *weights, **how))
    return add_virtual_output(y_ND, x_ND, plan), stats


def _where_none_dropped(
    y_ND: Array, stats: DispatchStats, exact: Callable[[], tuple[Array, DispatchStats]]
) -> tuple[Array, DispatchStats]:
    """What the buffers gave, or the exact result where they dropped anything."""
    return jax.lax.cond(stats.dropped > 0, exact, lambda: (y_ND, stats))


def _check(
    x_ND: Array, plan: RoutingPlan, w_gate_EDF: Array, dispatch: str, capacity: int | None, num_sequences: int
) -> None:
    require(x_ND.ndim == 2, f"x_ND has shape {x_ND.shape}; it must be [N, D]")
    tokens, planned = x_ND.shape[0], plan.expert_ids_NK.shape[0]
    require(tokens == planned, f"x_ND holds {tokens} tokens, the plan {planned}")
    require(
        w_gate_EDF.shape[0] == plan.spec.num_experts,
        f"the weights hold {w_gate_EDF.shape[0]} experts, the plan routes to {plan.spec.num_experts}",
    )
    require(
        num_sequences >= 1 and tokens % num_sequences == 0,
        f"num_sequences={num_sequences} must divide the {tokens} tokens",
    )
    require(capacity is None or dispatch == "capacity", f"capacity={capacity} has no meaning for dispatch={dispatch!r}")
    require(capacity is None or capacity >= 1, f"capacity={capacity} must be >= 1")

"""The cases of the layer benchmark: operands, routing and compiled calls."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.registries import IMPLEMENTATIONS
from anyexperts_jax.core.shapes import LayerShape
from anyexperts_jax.dispatch.apply import moe_apply, moe_apply_stats
from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.expert_mlp import expert_mlp
from anyexperts_jax.ops.row_map import RowMap, combine_rows, take_rows
from anyexperts_jax.ops.slot_order import SlotOrder
from anyexperts_jax.routing.plan import PlanSpec, RoutingPlan
from anyexperts_jax.routing.route import route

Weights = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


def operands(shape: LayerShape, dtype: str, seed: int = 0) -> tuple[Array, Weights]:
    """(x_ND, (w_gate_EDF, w_up_EDF, w_down_EFD)), unit normal tokens, weights scaled by their fan-in."""
    E, D, F = shape.experts, shape.width, shape.hidden
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 4)  # threefry is slow for up to 800M numbers
    sizes = ((shape.tokens, D), (E, D, F), (E, D, F), (E, F, D))

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: Array, size: tuple[int, ...]) -> Array:
        scale = size[1] ** -0.5 if len(size) == 3 else 1.0
        return (scale * jax.random.normal(key, size, jnp.float32)).astype(dtype)

    x_ND, w_gate_EDF, w_up_EDF, w_down_EFD = map(draw, keys, sizes)
    return x_ND, (w_gate_EDF, w_up_EDF, w_down_EFD)


def top_k_plan(shape: LayerShape, seed: int = 0) -> RoutingPlan:
    """Top-k over random logits, with K real slots for every token: the routing that every library can run."""
    config = AnyExpertsConfig.static_top_k(shape.experts, shape.slots)
    logits_NC = np.random.default_rng(seed).standard_normal((shape.tokens, shape.experts)).astype(np.float32)
    return jax.jit(route, static_argnums=0)(config, logits_NC, np.zeros(shape.tokens, np.float32))


def budget_plan(shape: LayerShape, slots_bound: int, real: float, seed: int = 0) -> RoutingPlan:
    """Gives each token floor(real) random distinct experts or one more, `real` on average; other slots are empty.

    Weights are equal, and a fifth of the weight is virtual. Plans of all budgets have the same shape, so that one
    program runs them all.
    """
    rng = np.random.default_rng(seed)
    N, E = shape.tokens, shape.experts
    real_N = np.full(N, int(real))
    real_N[rng.permutation(N)[: round(real * N) - real_N.sum()]] += 1
    ids_NK = rng.permuted(np.tile(np.arange(E, dtype=np.int32), (N, 1)), axis=1)[:, :slots_bound]
    held_NK = np.arange(slots_bound) < real_N[:, None]
    return RoutingPlan(
        expert_ids_NK=jnp.asarray(np.where(held_NK, ids_NK, E)),
        weights_NK=jnp.asarray(np.where(held_NK, 0.8 / real_N[:, None], 0), jnp.float32),
        virtual_weight_N=jnp.full(N, 0.2, jnp.float32),
        importance_N=jnp.full(N, 0.5, jnp.float32),
        slots_N=jnp.asarray(real_N + 1, jnp.int32),
        real_slots_N=jnp.asarray(real_N, jnp.int32),
        virtual_slots_N=jnp.ones(N, jnp.int32),
        losses={},
        metrics={},
        spec=PlanSpec(E, real),
    )


def implementations() -> list[str]:
    """The names of all implementations of the expert ops. The op itself checks whether one can run here."""
    return list(IMPLEMENTATIONS)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled call and the memory it needs in addition to its operands and results."""

    call: Callable[[], Any]
    temporary_mib: float


def temporary_mib(program: jax.stages.Compiled) -> float:
    """Memory a program needs in addition to operands and results; NaN if the backend does not report it."""
    memory = program.memory_analysis()
    return math.nan if memory is None else memory.temp_size_in_bytes / 2**20


def compiled(function: Callable[..., Any], *arguments: Any) -> Compiled:
    program = jax.jit(function).lower(*arguments).compile()
    return Compiled(functools.partial(program, *arguments), temporary_mib(program))


def layer(
    plan: RoutingPlan,
    x_ND: Array,
    weights: Weights,
    dispatch: str,
    implementation: str | None = None,
    *,
    backward: bool,
) -> Compiled:
    """`moe_apply`; with `backward` also the gradients of x, the combine weights and the experts."""

    def forward(x_ND: Array, plan: RoutingPlan, weights: Weights) -> Array:
        return moe_apply(x_ND, plan, *weights, dispatch=dispatch, implementation=implementation)

    def forward_and_backward(x_ND: Array, plan: RoutingPlan, weights: Weights) -> Any:
        def of(x_ND: Array, weights_NK: Array, weights: Weights) -> Array:
            return forward(x_ND, dataclasses.replace(plan, weights_NK=weights_NK), weights)

        return with_backward(of)(x_ND, plan.weights_NK, weights)

    return compiled(forward_and_backward if backward else forward, x_ND, plan, weights)


def with_backward(function: Callable[..., Array]) -> Callable[..., Any]:
    """Returns (the result, the gradients of its sum by every operand)."""

    def run(*operands: Any) -> Any:
        y, pullback = jax.vjp(function, *operands)
        return y, pullback(jnp.ones_like(y))

    return run


def ragged_layer(plan: RoutingPlan, x_ND: Array, weights: Weights, *, backward: bool) -> Compiled:
    """The layer in plain JAX: slots sorted by expert, three `jax.lax.ragged_dot`, and the weighted sum."""

    def forward(x_ND: Array, weights_NK: Array, weights: Weights) -> Array:
        w_gate_EDF, w_up_EDF, w_down_EFD = weights
        order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
        slots = weights_NK.shape[1]
        x_RD = x_ND[order.slots_R // slots]
        gate_RF, up_RF = (jax.lax.ragged_dot(x_RD, w, order.counts_E) for w in (w_gate_EDF, w_up_EDF))
        y_RD = jax.lax.ragged_dot(jax.nn.silu(gate_RF) * up_RF, w_down_EFD, order.counts_E)
        y_NKD = y_RD[order.places_NK]
        return jnp.einsum("nkd,nk->nd", y_NKD, weights_NK.astype(x_ND.dtype), preferred_element_type=jnp.float32)

    return compiled(with_backward(forward) if backward else forward, x_ND, plan.weights_NK, weights)


def ragged_bytes(shape: LayerShape) -> int:
    """Bytes of a ragged_dot's left operand as XLA expands it on a GPU, in bfloat16: every row once per expert."""
    return 2 * shape.tokens * shape.slots * shape.experts * shape.width


def capacity_drops(plan: RoutingPlan, x_ND: Array, weights: Weights) -> float:
    """The share of real slots that dispatch="capacity" drops."""
    _, stats = jax.jit(functools.partial(moe_apply_stats, dispatch="capacity"))(x_ND, plan, *weights)
    return float(stats.dropped) / float(plan.real_slots_N.sum())


def one_expert(
    shape: LayerShape, x_ND: Array, weights: Weights, implementation: str | None = None, *, backward: bool
) -> Compiled:
    """The same number of rows through one expert, without dispatch. A reference but not a bound: blocks that stay in
    the cache are faster."""
    rows = shape.tokens * shape.slots
    x_1RD = jnp.tile(x_ND, (shape.slots, 1))[None]

    def forward(x_1RD: Array, weights: Weights) -> Array:
        return expert_mlp(x_1RD, jnp.full(1, rows, jnp.int32), *weights, implementation)

    one = (weights[0][:1], weights[1][:1], weights[2][:1])
    return compiled(with_backward(forward) if backward else forward, x_1RD, one)


def layer_parts(
    shape: LayerShape, x_ND: Array, weights: Weights, implementation: str | None = None, seed: int = 0
) -> dict[str, Compiled]:
    """A whole AnyExperts layer, and all of its parts except for the experts.

    "layer" is the router matmul, `route` and dropless `moe_apply`; "route" is the first two; "sort" is sorting the
    slots; "gather" and "combine" move rows, which is an upper bound, because the layer does both inside its loop. The
    policy is the paper's: window [K, K + 2], and a quarter as many virtual experts as real ones.
    """
    config = AnyExpertsConfig(
        num_experts=shape.experts, num_virtual=shape.experts // 4, k_min=shape.slots, k_max=shape.slots + 2
    )
    rng = np.random.default_rng(seed)
    w_router_DC = jnp.asarray(rng.standard_normal((shape.width, config.num_columns)) * shape.width**-0.5, jnp.float32)
    importance_logits_N = jnp.asarray(rng.standard_normal(shape.tokens), jnp.float32)

    def route_tokens(x_ND: Array, w_router_DC: Array, importance_logits_N: Array) -> RoutingPlan:
        return route(config, x_ND.astype(jnp.float32) @ w_router_DC, importance_logits_N)

    def whole(x_ND: Array, w_router_DC: Array, importance_logits_N: Array, weights: Weights) -> Array:
        plan = route_tokens(x_ND, w_router_DC, importance_logits_N)
        return moe_apply(x_ND, plan, *weights, implementation=implementation)

    router = (x_ND, w_router_DC, importance_logits_N)
    plan = jax.jit(route_tokens)(*router)
    order = jax.jit(sort_slots, static_argnums=1)(plan.expert_ids_NK, shape.experts)
    rows = _row_map(plan, order)
    x_RD = jax.jit(take_rows)(x_ND, rows)
    return {
        "layer": compiled(whole, *router, weights),
        "route": compiled(route_tokens, *router),
        "sort": compiled(lambda ids_NK: sort_slots(ids_NK, shape.experts), plan.expert_ids_NK),
        "gather": compiled(take_rows, x_ND, rows),
        "combine": compiled(combine_rows, x_RD, plan.weights_NK, rows),
    }


def _row_map(plan: RoutingPlan, order: SlotOrder) -> RowMap:
    held_NK = plan.expert_ids_NK < plan.spec.num_experts
    return RowMap(
        tokens_R=order.slots_R // held_NK.shape[1],
        slots_R=order.slots_R,
        live_R=jnp.arange(held_NK.size) < held_NK.sum(),
        rows_NK=order.places_NK,
        held_NK=held_NK,
    )

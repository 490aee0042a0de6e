"""Routing plans built by hand, and the expected sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.routing.plan import PlanSpec, RoutingPlan

EXPERTS, WIDTH, HIDDEN = 5, 6, 7


def make_plan(ids_NK, num_experts=EXPERTS, *, seed=0, **spec) -> RoutingPlan:
    """A plan with these real slots (`num_experts` marks an empty one), random weights, some virtual weight."""
    rng = np.random.default_rng(seed)
    ids_NK = np.asarray(ids_NK, np.int32)
    real_N = (ids_NK < num_experts).sum(1).astype(np.int32)
    virtual_N = rng.integers(0, 2, len(ids_NK)).astype(np.int32)
    fields = {"expected_real_slots": 1.0, "virtual_output": "identity"}
    return RoutingPlan(
        expert_ids_NK=jnp.asarray(ids_NK),
        weights_NK=jnp.asarray(np.where(ids_NK < num_experts, rng.uniform(0.1, 1, ids_NK.shape), 0), jnp.float32),
        virtual_weight_N=jnp.asarray(virtual_N * rng.uniform(0.1, 1, len(ids_NK)), jnp.float32),
        importance_N=jnp.full(len(ids_NK), 0.5, jnp.float32),
        slots_N=jnp.asarray(real_N + virtual_N),
        real_slots_N=jnp.asarray(real_N),
        virtual_slots_N=jnp.asarray(virtual_N),
        losses={},
        metrics={},
        spec=PlanSpec(num_experts=num_experts, **{**fields, **spec}),
    )


def capacity_of(plan, rows) -> dict:
    """The options of `dispatch="capacity"` for this many rows per expert."""
    share = plan.spec.expected_real_slots * plan.expert_ids_NK.shape[0] / plan.spec.num_experts
    return {"dispatch": "capacity", "capacity_factor": rows / share}


def random_ids(rng, tokens, slots, num_experts=EXPERTS) -> np.ndarray:
    """For each token a random number of distinct experts, best first, then empty slots."""
    ranked = rng.permuted(np.tile(np.arange(num_experts), (tokens, 1)), axis=1)[:, :slots]
    ranked = np.pad(ranked, ((0, 0), (0, slots - ranked.shape[1])), constant_values=num_experts)
    real_N1 = rng.integers(0, min(slots, num_experts) + 1, (tokens, 1))
    return np.where(np.arange(slots) < real_N1, ranked, num_experts)


_rng = np.random.default_rng(7)
_EMPTY = EXPERTS
PLANS = {
    "random": make_plan(random_ids(_rng, 12, 3)),
    "many tokens": make_plan(random_ids(_rng, 301, 3)),
    "one token": make_plan([[3, 1, _EMPTY]]),
    "one token without slots": make_plan([[_EMPTY, _EMPTY]]),
    "one expert": make_plan([[0], [1], [0], [1]], 1),
    "experts without tokens": make_plan(np.full((6, 2), [4, 1])),
    "all on the first": make_plan(np.zeros((9, 1))),
    "all on the last": make_plan(np.full((9, 1), EXPERTS - 1)),
    "all slots virtual": make_plan(np.full((4, 2), _EMPTY)),
    "zero virtual output": make_plan(random_ids(_rng, 8, 2), virtual_output="zero"),
    "more slots than experts": make_plan(random_ids(_rng, 8, EXPERTS + 2)),
}


def make_operands(num_tokens, num_experts=EXPERTS, dtype=np.float32, width=WIDTH, hidden=HIDDEN, seed=1):
    """(x_ND, w_gate_EDF, w_up_EDF, w_down_EFD), unit normal, the weights scaled by their fan-in."""
    rng = np.random.default_rng(seed)
    shapes = ((num_tokens, width), (num_experts, width, hidden), (num_experts, width, hidden))
    shapes += ((num_experts, hidden, width),)
    scales = (1, width**-0.5, width**-0.5, hidden**-0.5)
    return tuple(jnp.asarray(rng.normal(size=s) * scale, dtype) for s, scale in zip(shapes, scales, strict=True))


def oracle(x_ND, weights_NK, virtual_weight_N, w_gate_EDF, w_up_EDF, w_down_EFD, plan):
    """The sum over each token's slots, each with its own expert's weights; empty slots add expert 0 times 0."""
    ids_NK = jnp.where(plan.expert_ids_NK < plan.spec.num_experts, plan.expert_ids_NK, 0)
    gate = jnp.einsum("nd,nkdf->nkf", x_ND, w_gate_EDF[ids_NK])
    up = jnp.einsum("nd,nkdf->nkf", x_ND, w_up_EDF[ids_NK])
    y = jnp.einsum("nkf,nkfd->nkd", jax.nn.silu(gate) * up, w_down_EFD[ids_NK])
    real = plan.expert_ids_NK < plan.spec.num_experts
    total = jnp.einsum("nk,nkd->nd", jnp.where(real, weights_NK, 0), y)
    return total + float(plan.spec.virtual_output == "identity") * virtual_weight_N[:, None] * x_ND


@jax.jit
def _oracle_and_gradients(plan, *arguments):
    y, pullback = jax.vjp(lambda *a: oracle(*a, plan), *arguments)
    return y, pullback(jnp.cos(y))


def oracle_value_and_gradients(plan, operands):
    """The oracle's output, and the gradients of sum(sin(output)) by x, combine weights, virtual weight and weights."""
    with jax.enable_x64(True):
        x, *weights = operands
        arguments = (x, plan.weights_NK, plan.virtual_weight_N, *weights)
        float64 = (jnp.asarray(np.asarray(a, np.float64)) for a in arguments)
        return jax.tree.map(np.asarray, _oracle_and_gradients(plan, *float64))

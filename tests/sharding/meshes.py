"""Meshes of eight devices, plans for their tokens, and comparison with the result of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from anyexperts_jax.dispatch.apply import moe_apply_stats
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement
from tests.dispatch.plans import make_operands, make_plan, random_ids

EXPERTS, SEQUENCES, LENGTH, SLOTS, WIDTH, HIDDEN = 16, 8, 6, 3, 6, 8
EMPTY = EXPERTS
TOKENS = SEQUENCES * LENGTH
MESHES = {
    "expert 8": MeshConfig(data=1, expert=8),
    "data 2, expert 4": MeshConfig(data=2, expert=4),
    "fsdp 2, expert 2, tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "expert 2, sequence 2, data 2": MeshConfig(data=2, expert=2, sequence=2),
    "data 8": MeshConfig(data=8),
    "two slices along fsdp, expert 4": MeshConfig(data=1, expert=4, dcn_fsdp=2),
}
CASES = {
    "random": random_ids(np.random.default_rng(0), TOKENS, SLOTS, EXPERTS),
    "all on one expert": np.tile([[5, EMPTY, EMPTY]], (TOKENS, 1)),
    "one shard's experts alone": np.tile([[0, 1, EMPTY]], (TOKENS, 1)),
    "one sequence has slots": np.where(np.arange(TOKENS)[:, None] < LENGTH, [[3, 9, EMPTY]], EMPTY),
    "no slot at all": np.full((TOKENS, SLOTS), EMPTY),
}


def plan_of(case, **spec):
    return make_plan(CASES[case], EXPERTS, **{"expected_real_slots": 1.5, "virtual_output": "zero", **spec})


def place(mesh):
    return Placement(make_mesh(mesh))


def dispatched(placement, dispatch, num_sequences=SEQUENCES, **execution):
    """The call that a layer on the mesh makes."""
    how = {"num_sequences": num_sequences, "placement": placement, "dispatch": dispatch, **execution}
    return lambda x, plan, *weights: moe_apply_stats(x, plan, *weights, **how)


def blocks(placement):
    return dispatched(placement, "blocks")


def capacity(placement):
    return dispatched(placement, "capacity")


def capacity_or_exact(placement):
    return dispatched(placement, "capacity", overflow="fallback")


@functools.cache
def value_and_gradients(mesh, form):
    """A compiled function of plan and operands, on a mesh or (None) on one device."""
    run = form(place(MESHES[mesh]) if mesh else None)

    def total(x, weights_NK, weights, plan):
        y_ND, stats = run(x, dataclasses.replace(plan, weights_NK=weights_NK), *weights)
        return jnp.sin(y_ND).sum(), (y_ND, stats)

    compiled = jax.jit(jax.value_and_grad(total, range(3), has_aux=True))
    return lambda plan, x, *weights: compiled(x, plan.weights_NK, weights, plan)


def assert_as_one_device(mesh, form, plan, one=blocks):
    """Checks that `form` on the mesh has the values and gradients of `one` on one device; returns the stats of both."""
    operands = make_operands(TOKENS, EXPERTS, width=WIDTH, hidden=HIDDEN)
    (_, (y_ND, stats)), gradients = value_and_gradients(mesh, form)(plan, *split_over(mesh, operands))
    (_, (expected_ND, expected_stats)), expected = value_and_gradients(None, one)(plan, *operands)
    np.testing.assert_allclose(y_ND, expected_ND, rtol=2e-5, atol=2e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    return stats, expected_stats


def split_over(mesh, operands):
    """Splits tokens over the axes of the batch, and weights like parameters."""
    placement = place(MESHES[mesh])
    axes = [("batch",), *[("expert", "embed", "expert_mlp")] * 2, ("expert", "expert_mlp", "embed")]
    shardings = [NamedSharding(placement.mesh, placement.rules.spec(names)) for names in axes]
    return jax.device_put(operands, tuple(shardings))

"""Every participant of a collective takes the same branch: read off the program for a mesh on which all axes split.

A device that skipped an all-to-all, or a reduction, would leave the others waiting for ever. So wherever a `cond` or a
`while` holds a collective, what decides must be equal on all devices. The program is followed from its inputs, which
may differ between any two devices, through every equation: a reduction over an axis makes equal along it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from anyexperts_jax.dispatch import exchange
from anyexperts_jax.dispatch.apply import apply_plan
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.sharding.mesh import MESH_AXES
from anyexperts_jax.sharding.placement import Placement
from tests.dispatch.plans import make_operands, make_plan, random_ids

ALL = frozenset(MESH_AXES)
REDUCED = ("psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant")
COLLECTIVES = (*REDUCED, "all_to_all", "ppermute", "psum_scatter", "reduce_scatter")
EXPERTS, TOKENS, SEQUENCES, SLOTS = 8, 64, 16, 3


def test_the_rounds_of_an_exchange_are_entered_by_all_devices_or_by_none():
    decided = branches_with_collectives(gradients)
    assert len(decided) == 2, "the rounds of the forward and of the backward pass"
    assert set(decided) == {frozenset()}


def test_a_predicate_reduced_over_one_axis_only_is_found(monkeypatch):
    """An earlier version reduced it over the expert axis only, so two data shards could take different branches."""
    whole = exchange.exchange_slots
    monkeypatch.setattr(exchange, "exchange_slots", lambda *given: whole(*given[:-1], (given[-1][0], (given[-1][0],))))
    assert set(branches_with_collectives(gradients)) == {ALL - {"expert"}}


def gradients(x_ND, plan, experts):
    execution = Execution("exchange", implementation="xla", capacity_factor=0.5, overflow="fallback")
    devices = np.tile(jax.devices(), 4)  # 32 places for 8 devices: the program is read and never runs
    placement = Placement(Mesh(devices.reshape((2,) * 5), MESH_AXES, axis_types=(AxisType.Auto,) * 5))
    total = lambda x_ND, experts: jnp.sin(apply_plan(x_ND, plan, experts, execution, placement)[0]).sum()  # noqa: E731
    return jax.value_and_grad(total, (0, 1))(x_ND, experts)


def branches_with_collectives(function):
    """For each branch that holds a collective, the axes along which devices may decide differently."""
    ids_NK = random_ids(np.random.default_rng(0), TOKENS, SLOTS, EXPERTS)
    plan = make_plan(ids_NK, EXPERTS, expected_real_slots=1.5, num_sequences=SEQUENCES)
    x_ND, *weights = make_operands(TOKENS, EXPERTS, width=4, hidden=4)
    program = jax.make_jaxpr(lambda *given: function(*given))(x_ND, plan, ExpertWeights(*weights))
    found = []
    follow(program.jaxpr, [ALL] * len(program.jaxpr.invars), found)
    return found


def follow(jaxpr, given, found):
    """The axes along which each output may differ between devices, if the inputs may differ along `given`."""
    axes = dict(zip(jaxpr.invars, given, strict=True))
    read = lambda atom: axes.get(atom, frozenset()) if not hasattr(atom, "val") else frozenset()  # noqa: E731
    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        axes.update(zip(equation.outvars, outputs(equation, inputs, found), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def outputs(equation, inputs, found):
    name, params, together = equation.primitive.name, equation.params, frozenset().union(*inputs)
    if name == "axis_index":
        return [frozenset({params["axis_name"]})]
    if name in REDUCED:
        reduced = params.get("axes", params.get("axis_name"))
        return [each - set(reduced if isinstance(reduced, tuple) else (reduced,)) for each in inputs]
    inner = [part for value in params.values() for part in bodies(value)]
    if name == "cond":
        taken = [follow(branch, inputs[1:], found) for branch in inner]
        note(found, inner, inputs[0])
        return [frozenset().union(inputs[0], *each) for each in zip(*taken, strict=True)]
    if name == "scan":
        carried = sum(same_rank(inner[0].outvars, equation.outvars))  # JAX's versions name this differently
        constants = sum(same_rank(inner[0].invars, equation.invars)) - carried
        for _ in range(len(ALL) + 1):  # the axes along which the carry differs can only grow
            made = follow(inner[0], inputs, [])
            carry = [a | b for a, b in zip(inputs[constants:][:carried], made, strict=False)]
            inputs = [*inputs[:constants], *carry, *inputs[constants + carried :]]
        return follow(inner[0], inputs, found)
    if name == "while":
        for body in inner:
            follow(body, [ALL] * len(body.invars), found)
        note(found, inner, ALL)
        return [ALL] * len(equation.outvars)
    if len(inner) == 1 and len(inner[0].invars) == len(inputs):
        return follow(inner[0], inputs, found)
    assert not any(map(holds_collective, inner)), f"{name} is called in a way that this test does not know"
    return [together] * len(equation.outvars)


def same_rank(inner, outer):
    """True for those that are not stacked: what a scan reads or writes step by step has one more axis outside."""
    return [a.aval.ndim == b.aval.ndim for a, b in zip(inner, outer, strict=True)]


def bodies(value):
    """The programs in a parameter of an equation."""
    values = value if isinstance(value, tuple | list) else [value]
    return [getattr(each, "jaxpr", each) for each in values if hasattr(getattr(each, "jaxpr", each), "eqns")]


def note(found, inner, axes):
    if any(map(holds_collective, inner)):
        found.append(axes)


def holds_collective(jaxpr):
    return any(
        equation.primitive.name in COLLECTIVES
        or any(holds_collective(part) for value in equation.params.values() for part in bodies(value))
        for equation in jaxpr.eqns
    )

"""What users of JAX pass: NumPy arrays, lists, other dtypes, x64; and `shard_map` with its checks enabled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from typecheck import unchecked

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch import moe_apply, moe_apply_stats
from anyexperts_jax.dispatch.apply import apply_plan
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.ops.expert_mlp import expert_mlp
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.routing.plan import DISPATCHED
from tests.dispatch.plans import EXPERTS, PLANS, capacity_of, make_operands

PLAN = PLANS["random"]
TOKENS = PLAN.expert_ids_NK.shape[0]
X, *WEIGHTS = make_operands(TOKENS)
FORMS = ("blocks", "capacity", "dense")


def plan_with(**arrays):
    """A plan with unchecked arrays."""
    plan = dataclasses.replace(PLAN)
    for name, array in arrays.items():
        object.__setattr__(plan, name, array)
    return plan


def how(dispatch):
    return capacity_of(PLAN, TOKENS) if dispatch == "capacity" else {"dispatch": dispatch}


def strided(array):
    """Converts to float64, not contiguous."""
    return np.repeat(np.asarray(array, np.float64), 2, axis=0)[::2]


@pytest.mark.parametrize(
    "hold", [np.asarray, strided, lambda a: np.asarray(a).tolist()], ids=["same", "strided", "list"]
)
@pytest.mark.parametrize("dispatch", FORMS)
def test_arrays_in_any_form_are_accepted(dispatch, hold):
    expected = moe_apply(X, PLAN, *WEIGHTS, **how(dispatch))
    plan = plan_with(**{name: np.asarray(getattr(PLAN, name)) for name in DISPATCHED})
    held = [hold(a) for a in (X, *WEIGHTS)]
    y_ND, stats = unchecked(moe_apply_stats)(held[0], plan, *held[1:], **how(dispatch))
    np.testing.assert_allclose(y_ND, expected, rtol=1e-5, atol=1e-5)
    assert int(stats.dropped) == 0
    again, _ = unchecked(apply_plan)(held[0], plan, tuple(held[1:]), Execution(**how(dispatch)))
    np.testing.assert_array_equal(again, y_ND)


def test_expert_mlp_takes_numpy():
    rows = np.asarray(X, np.float64)[None].repeat(EXPERTS, 0)[:, ::2]
    counts = np.full(EXPERTS, 3)
    expected = expert_mlp(jnp.asarray(rows, jnp.float32), jnp.asarray(counts), *WEIGHTS)
    np.testing.assert_allclose(expert_mlp(rows, counts, *map(strided, WEIGHTS)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x_ND": X.astype(jnp.float8_e4m3fn)},
            "x_ND is float8_e4m3fn; it must be one of float16, bfloat16, float32, ",
        ),
        ({"x_ND": X.astype(jnp.int32)}, "x_ND is int32; it must be one of"),
        ({"x_ND": X.astype(jnp.complex64)}, "x_ND holds complex64; it must be an array of real numbers"),
        ({"x_ND": np.array(["a"])}, "x_ND holds <U1; it must be an array of real numbers"),
        ({"x_ND": None}, "x_ND holds object; it must be an array of real numbers"),
        ({"x_ND": [[1.0], [1.0, 2.0]]}, "x_ND is no array: "),
        ({"x_ND": X[0]}, r"x_ND has shape \(6,\); it must be \[N, D\]"),
        ({"x_ND": X[:, :3]}, "x has width 3, the experts 6"),
        ({"plan": (1, 2)}, "plan is a tuple; it must be a RoutingPlan, as route gives"),
        (
            {"plan": plan_with(expert_ids_NK=np.where(PLAN.expert_ids_NK == 0, -1, PLAN.expert_ids_NK))},
            "plan.expert_ids_NK holds -1; ids are those of the experts, or E for none, 0 to 5",
        ),
        (
            {"plan": plan_with(weights_NK=PLAN.weights_NK[:, :1])},
            r"plan.weights_NK is float32\[12, 1\]; it must hold floats, \[12, 3\]",
        ),
        ({"num_sequences": 2.5}, "num_sequences=2.5 must be a whole number"),
    ],
)
def test_invalid_arguments_end_in_one_line(change, message):
    given = {"x_ND": X, "plan": PLAN, **change}
    with pytest.raises(UserError, match=f"^{message}") as error:
        unchecked(moe_apply_stats)(given.pop("x_ND"), given.pop("plan"), *WEIGHTS, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dispatch", FORMS)
def test_x64_changes_no_dtype_of_float32(dispatch):
    expected = moe_apply(X, PLAN, *WEIGHTS, **how(dispatch))
    with jax.enable_x64(True):
        y_ND, stats = moe_apply_stats(X, PLAN, *WEIGHTS, **how(dispatch))
        gradients = jax.grad(lambda *a: moe_apply(a[0], PLAN, *a[1:], **how(dispatch)).sum(), range(4))(X, *WEIGHTS)
    assert {a.dtype.name for a in (y_ND, *gradients)} == {"float32"}
    assert {count.dtype.name for count in stats} == {"int32"}
    np.testing.assert_allclose(y_ND, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dispatch", [*FORMS, "fallback"])
def test_shard_map_with_its_checks_on(dispatch, implementation):
    """Tokens split over devices, weights the same on all: their gradients are summed."""
    options = how(dispatch) if dispatch != "fallback" else {**how("capacity"), "overflow": "fallback"}
    options["implementation"] = implementation
    if dispatch == "fallback":
        options["capacity_factor"] = 0.1
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("d"), PartitionSpec()
    of_plan = jax.tree.map(lambda a: split if a.ndim and a.shape[0] == TOKENS else whole, PLAN)
    in_specs = (split, of_plan, whole, whole, whole)
    run = jax.shard_map(lambda *a: moe_apply(*a, **options), mesh=mesh, in_specs=in_specs, out_specs=split)

    def value_and_gradients(apply):
        return jax.jit(jax.value_and_grad(lambda x, *w: jnp.sin(apply(x, PLAN, *w)).sum(), range(4)))(X, *WEIGHTS)

    actual, expected = value_and_gradients(run), value_and_gradients(lambda *a: moe_apply(*a, dispatch="dense"))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_expert_weights_must_be_three_arrays():
    with pytest.raises(UserError, match=r"^the experts' weights are .*; they must be ExpertWeights\(gate_EDF"):
        unchecked(apply_plan)(X, PLAN, ExpertWeights(*WEIGHTS)[:2], Execution())

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.nn.importance import ImportanceMLP
from nn.layers import equations, initial_params, random_params, run, shapes

X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)


@pytest.mark.parametrize(
    ("form", "kernels"),
    [
        ("default", {"hidden_0": (16, 4), "out": (4,)}),
        ("wide", {"hidden_0": (16, 16), "out": (16,)}),
        ("deep", {"hidden_0": (16, 4), "hidden_1": (4, 4), "hidden_2": (4, 4), "out": (4,)}),
    ],
)
def test_forms(form, kernels):
    params = shapes(ImportanceMLP(form), X_BTD)
    assert {name: p["kernel"].shape for name, p in params.items() if "kernel" in p} == kernels


def test_starts_at_logit_zero():
    params = initial_params(ImportanceMLP(), X_BTD)
    np.testing.assert_array_equal(run(ImportanceMLP())(params, X_BTD), np.zeros((2, 3)))


def test_matches_the_equations():
    params = random_params(ImportanceMLP(), X_BTD)
    p = {f"{a}/{b}": np.asarray(v, np.float64) for a, sub in params.items() for b, v in sub.items()}
    x = np.asarray(X_BTD, np.float64)
    h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["norm/scale"]
    h = h @ p["hidden_0/kernel"] + p["hidden_0/bias"]
    expected = (h / (1 + np.exp(-h))) @ p["out/kernel"] + p["out/bias"]
    np.testing.assert_allclose(run(ImportanceMLP())(params, X_BTD), expected, atol=1e-5)


def test_is_float32_on_bfloat16_input():
    x_BTD = X_BTD.astype(jnp.bfloat16)
    params = random_params(ImportanceMLP(), X_BTD)
    z_BT = run(ImportanceMLP())(params, x_BTD)
    assert z_BT.dtype == jnp.float32
    np.testing.assert_allclose(z_BT, run(ImportanceMLP())(params, x_BTD.astype(jnp.float32)), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "HIGH")])
def test_matmuls_are_as_exact_as_the_token_and_take_float32_operands(dtype, precision):
    params = random_params(ImportanceMLP(), X_BTD)
    total = lambda params, x_BTD: ImportanceMLP().apply({"params": params}, x_BTD).sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(total, (0, 1)))(params, X_BTD.astype(dtype))
    dots = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(dots) == 6  # two maps, each once forward and twice backward
    for dot in dots:
        assert {one.name for one in dot.params["precision"]} == {precision}
        assert {operand.aval.dtype for operand in dot.invars} == {jnp.dtype(jnp.float32)}

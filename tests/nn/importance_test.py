import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.nn.importance import ImportanceMLP

X_BTD = jax.random.normal(jax.random.key(0), (2, 3, 16))


def values(variables):
    return jax.tree.map(lambda b: b.value, variables, is_leaf=lambda n: hasattr(n, "names"))


@pytest.mark.parametrize(
    ("form", "kernels"),
    [
        ("default", {"hidden_0": (16, 4), "out": (4,)}),
        ("wide", {"hidden_0": (16, 16), "out": (16,)}),
        ("deep", {"hidden_0": (16, 4), "hidden_1": (4, 4), "hidden_2": (4, 4), "out": (4,)}),
    ],
)
def test_forms(form, kernels):
    params = values(ImportanceMLP(form).init(jax.random.key(1), X_BTD))["params"]
    assert {name: p["kernel"].shape for name, p in params.items() if "kernel" in p} == kernels


def test_starts_at_logit_zero():
    layer = ImportanceMLP()
    z_BT, _ = layer.init_with_output(jax.random.key(1), X_BTD)
    np.testing.assert_array_equal(z_BT, np.zeros((2, 3)))


def test_matches_the_equations():
    params = values(ImportanceMLP().init(jax.random.key(1), X_BTD))["params"]
    params["out"] = {"kernel": jnp.array([1.0, -2.0, 0.5, 3.0]), "bias": jnp.float32(0.25)}
    x = np.asarray(X_BTD, np.float64)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    h = normed @ np.asarray(params["hidden_0"]["kernel"], np.float64)
    expected = (h / (1 + np.exp(-h))) @ np.array([1.0, -2.0, 0.5, 3.0]) + 0.25
    np.testing.assert_allclose(ImportanceMLP().apply({"params": params}, X_BTD), expected, atol=1e-5)


def test_is_float32_on_bfloat16_input():
    params = ImportanceMLP().init(jax.random.key(1), X_BTD)
    assert ImportanceMLP().apply(params, X_BTD.astype(jnp.bfloat16)).dtype == jnp.float32

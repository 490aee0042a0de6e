"""Derivatives beyond `jax.grad`: against float64 finite differences and the dense reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch import moe_apply
from anyexperts_jax.ops.expert_mlp.gpu_passes import GpuOptions
from anyexperts_jax.ops.expert_mlp.vjp_gpu import expert_mlp_triton
from tests.dispatch.plans import EXPERTS, PLANS, capacity_of, make_operands

PLAN = PLANS["random"]
TOKENS = PLAN.expert_ids_NK.shape[0]
OPERANDS = (PLAN.weights_NK, *make_operands(TOKENS))
DIRECTIONS = tuple(jnp.asarray(np.random.default_rng(3).normal(size=a.shape), a.dtype) for a in OPERANDS)
FORMS = [(dispatch, name) for dispatch in ("blocks", "capacity", "dense") for name in ("reference", "xla")]


def loss(dispatch, implementation):
    how = capacity_of(PLAN, TOKENS) if dispatch == "capacity" else {"dispatch": dispatch}

    def run(weights_NK, x_ND, *experts):
        plan = dataclasses.replace(PLAN, weights_NK=weights_NK)
        return jnp.sin(moe_apply(x_ND, plan, *experts, implementation=implementation, **how)).sum()

    return run


def along(f):
    """The value of `f` as a function of how far its operands go along the directions."""
    return lambda t: f(*(a + t * d for a, d in zip(OPERANDS, DIRECTIONS, strict=True)))


SECOND = {
    "jvp of grad": lambda f: jax.jvp(jax.grad(f, range(5)), OPERANDS, DIRECTIONS)[1],
    "grad of jvp": lambda f: jax.grad(lambda *a: jax.jvp(f, a, DIRECTIONS)[1], range(5))(*OPERANDS),
    "grad of grad": lambda f: jax.grad(
        lambda *a: sum((g * d).sum() for g, d in zip(jax.grad(f, range(5))(*a), DIRECTIONS, strict=True)), range(5)
    )(*OPERANDS),
}


@pytest.mark.parametrize(("dispatch", "implementation"), FORMS)
def test_jvp_is_the_slope_of_finite_differences(dispatch, implementation):
    with jax.enable_x64(True):
        wide = [[jnp.asarray(np.asarray(a, np.float64)) for a in side] for side in (OPERANDS, DIRECTIONS)]
        f = loss(dispatch, implementation)
        at = lambda t: f(*(a + t * d for a, d in zip(*wide, strict=True)))  # noqa: E731
        slope = jax.jit(lambda: jax.jvp(f, *map(tuple, wide))[1])()
        step = 1e-5
        np.testing.assert_allclose(slope, (at(step) - at(-step)) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("order", SECOND)
@pytest.mark.parametrize(("dispatch", "implementation"), FORMS[:-2])
def test_second_derivatives_are_those_of_the_dense_reference(dispatch, implementation, order):
    actual = jax.jit(lambda: SECOND[order](loss(dispatch, implementation)))()
    expected = jax.jit(lambda: SECOND["jvp of grad"](loss("dense", "reference")))()
    for a, b in zip(actual[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    # A slot without an expert has no weight, so what the dense form computes there is not a derivative of the layer.
    real_NK = (PLAN.expert_ids_NK < EXPERTS).astype(jnp.float32)
    np.testing.assert_allclose(actual[0] * real_NK, expected[0] * real_NK, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dispatch", "implementation"), FORMS)
def test_jacfwd_is_jacrev_and_hessian_is_symmetric(dispatch, implementation):
    f = along(loss(dispatch, implementation))
    forward, reverse, curvature = jax.jit(lambda: (jax.jacfwd(f)(0.0), jax.jacrev(f)(0.0), jax.hessian(f)(0.0)))()
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)
    products = SECOND["jvp of grad"](loss("dense", "reference"))
    expected = sum(float((p * d).sum()) for p, d in zip(products, DIRECTIONS, strict=True))
    np.testing.assert_allclose(curvature, expected, rtol=1e-3)


def test_kernels_say_that_they_support_grad_only():
    x_ECD, counts_E = jnp.ones((2, 16, 16)), jnp.array([3, 5])
    weights = [jnp.ones((2, 16, 16)) for _ in range(3)]
    run = lambda x: expert_mlp_triton(x, counts_E, *weights, GpuOptions(interpret=True)).sum()  # noqa: E731
    for derivative in (jax.jacfwd(run), jax.hessian(run), jax.grad(lambda x: jax.grad(run)(x).sum())):
        with pytest.raises(UserError, match=r"support first-order reverse mode \(jax.grad\).*implementation='xla'"):
            derivative(x_ECD)

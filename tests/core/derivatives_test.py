import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from anyexperts_jax.core.derivatives import Differentiable, linear
from anyexperts_jax.core.errors import UserError

X, W = jnp.linspace(0.1, 1, 5), jnp.linspace(0.3, 2, 4)
TWO_X = jnp.stack([X, 2 * X])
COUNT = jnp.int32(3)


def definition(x, w, count):
    """The sum of sin(x w_i) over the first `count` of w."""
    return jnp.where(jnp.arange(w.shape[0])[:, None] < count, jnp.sin(x[None] * w[:, None]), 0).sum(0)


@Differentiable
def looped(x, w, count):
    """`definition` by a loop of run-time length, which JAX cannot differentiate in reverse mode."""
    return lax.fori_loop(0, count, lambda i, total: total + jnp.sin(x * w[i]), jnp.zeros_like(x))


def _backward(residuals, d_out):
    x, w, count = residuals

    def add(i, gradients):
        d_x, d_w = gradients
        d_phase = jnp.cos(x * w[i]) * d_out
        return d_x + d_phase * w[i], d_w.at[i].set((d_phase * x).sum())

    return *lax.fori_loop(0, count, add, (jnp.zeros_like(x), jnp.zeros_like(w))), None


looped.defvjp(lambda *operands: (looped.run(*operands), operands), _backward, definition=definition)


def square(f):
    return lambda x, w: (f(x, w, COUNT) ** 2).sum()


def scanned(f):
    return lambda x, w: lax.scan(lambda x, _: (f(x, w, COUNT), None), x, None, length=3)[0].sum()


def batched(f):
    return lambda x, w: jax.vmap(square(f), (0, None))(x, w).sum()


BOTH = (0, 1)
DERIVATIVES = {
    "grad": lambda f: jax.grad(square(f), BOTH)(X, W),
    "grad of one": lambda f: jax.grad(square(f), 1)(X, W),
    "jvp": lambda f: jax.jvp(square(f), (X, W), (W[0] * X, 2 * W)),
    "jvp of one": lambda f: jax.jvp(lambda x: f(x, W, COUNT), (X,), (X,)),
    "jacfwd": lambda f: jax.jacfwd(lambda x, w: f(x, w, COUNT), BOTH)(X, W),
    "jacrev": lambda f: jax.jacrev(lambda x, w: f(x, w, COUNT), BOTH)(X, W),
    "hessian": lambda f: jax.hessian(square(f), BOTH)(X, W),
    "grad of grad": lambda f: jax.jacrev(jax.jacrev(square(f), BOTH), BOTH)(X, W),
    "grad of jvp": lambda f: jax.jacrev(jax.jacfwd(square(f), BOTH), BOTH)(X, W),
    "jvp of jvp": lambda f: jax.jacfwd(jax.jacfwd(square(f), BOTH), BOTH)(X, W),
    "third order": lambda f: jax.jacfwd(jax.jacrev(jax.jacrev(square(f))))(X, W),
    "vmap of grad": lambda f: jax.vmap(jax.grad(square(f), BOTH), (0, None))(TWO_X, W),
    "grad of vmap": lambda f: jax.grad(batched(f), BOTH)(TWO_X, W),
    "hessian of vmap": lambda f: jax.hessian(batched(f), BOTH)(TWO_X, W),
    "transpose": lambda f: jax.linear_transpose(jax.linearize(lambda x: f(x, W, COUNT), X)[1], X)(X),
    "grad of remat": lambda f: jax.grad(jax.checkpoint(square(f)), BOTH)(X, W),
    "hessian of remat": lambda f: jax.hessian(jax.checkpoint(square(f)), BOTH)(X, W),
    "grad of scan": lambda f: jax.grad(scanned(f), BOTH)(X, W),
    "hessian of scan": lambda f: jax.hessian(scanned(f), BOTH)(X, W),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_the_definition(name):
    actual, expected = (jax.jit(functools.partial(DERIVATIVES[name], f))() for f in (looped, definition))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_grad_runs_the_given_backward_pass_and_only_what_is_needed():
    program = str(jax.make_jaxpr(jax.grad(square(looped), BOTH))(X, W))
    assert program.count("while[") == 2, "one loop forward, one backward, the definition nowhere"
    if jax.__version_info__ >= (0, 11):  # before, JAX leaves a loop's unused results to XLA
        lowered = jax.jit(jax.grad(square(looped))).lower(X, W)
        assert "scatter" not in lowered.as_text(), "the gradient of w must not be computed"


@functools.partial(Differentiable, num_static=1)
def kernel(x, power=2):
    return x**power


kernel.defvjp(
    lambda x, power: (kernel.run(x, power), x), lambda power, x, d: (power * x * d,), refusal="kernel has grad alone"
)


def test_without_a_definition_only_grad_works():
    assert jax.grad(kernel)(3.0) == 6
    assert jax.grad(kernel)(3.0, power=2) == 6
    assert jax.vmap(jax.grad(kernel))(jnp.ones(2)).tolist() == [2, 2]
    for derivative in (jax.jacfwd(kernel), jax.grad(jax.grad(kernel)), jax.hessian(kernel)):
        for run in (derivative, jax.jit(derivative)):
            with pytest.raises(UserError, match="kernel has grad alone"):
                run(3.0)


PLACES = jnp.array([3, 0, 3, 1])


def picked(x, w, _):
    """A `linear` part (a gather) followed by plain multiplications."""
    taken = linear(lambda x, places: x[places], lambda d, places: jnp.zeros(5).at[places].add(d), x, PLACES)
    return (taken * w[PLACES]).sum() * x


def picked_plainly(x, w, _):
    return (x[PLACES] * w[PLACES]).sum() * x


@pytest.mark.parametrize("name", ["grad", "jvp", "transpose", "grad of vmap", "grad of remat", "hessian of scan"])
def test_derivatives_of_a_linear_function_with_its_transpose(name):
    actual, expected = (jax.jit(functools.partial(DERIVATIVES[name], f))() for f in (picked, picked_plainly))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_rematerialised_forward_pass_does_not_compute_what_is_linear_again():
    def total(x):
        return linear(lambda y, places: y[places], lambda d, places: jnp.zeros(5).at[places].add(d), jnp.sin(x), PLACES)

    program = str(jax.make_jaxpr(jax.grad(jax.checkpoint(lambda x: total(x).sum())))(X))
    assert (program.count("= sin "), program.count("= cos ")) == (1, 1), "the sine of the forward pass alone"

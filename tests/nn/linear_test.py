import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.ops.contraction import Contraction, contract
from nn.layers import equations, random_params, run


def test_contracts_the_last_axes():
    layer = Linear((6, 7), ("heads", "head_dim", "embed", "mlp"), num_in=2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4, 5)), jnp.float32)
    params = random_params(layer, x)
    assert params["kernel"].shape == (4, 5, 6, 7)
    np.testing.assert_allclose(
        run(layer)(params, x), np.einsum("btha,haij->btij", x, params["kernel"]), rtol=1e-5, atol=1e-5
    )
    boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))["params"]
    assert boxed["kernel"].names == ("heads", "head_dim", "embed", "mlp")


def test_may_give_one_scalar_and_add_a_bias():
    layer = Linear((), ("importance",), use_bias=True)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), jnp.float32)
    params = random_params(layer, x)
    assert params["bias"].shape == ()
    np.testing.assert_allclose(
        run(layer)(params, x), np.asarray(x) @ np.asarray(params["kernel"]) + params["bias"], rtol=1e-4
    )


def test_computes_in_one_dtype_and_returns_another():
    # 512 times 1 + 1/128 is 516, and 515 once one weight is 0: bfloat16's eight bits cannot tell them apart.
    kernel = jnp.full((512, 1), 1 + 2**-7).at[0].set(2**-7)
    layer = Linear((1,), ("embed", "vocab"), dtype="bfloat16", out_dtype="float32")
    y = run(layer)({"kernel": kernel}, jnp.ones((1, 512)))
    assert y.dtype == jnp.float32
    assert float(y[0, 0]) == 515.0
    assert (
        run(Linear((1,), ("embed", "mlp"), dtype="bfloat16"))({"kernel": kernel}, jnp.ones((1, 512))).dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize(("num_in", "spec"), [(1, "btd,dhf->bthf"), (2, "btd,tdf->bf")])
def test_gradients_are_those_of_the_einsum(num_in, spec):
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 4), (4, 5, 6) if num_in == 1 else (3, 4, 6))
    )
    ours = lambda x, k: (contract(x, k, Contraction(num_in)) ** 2).sum()  # noqa: E731
    theirs = lambda x, k: (jnp.einsum(spec, x, k) ** 2).sum()  # noqa: E731
    grads, expected = (jax.jit(jax.grad(f, (0, 1)))(x, kernel) for f in (ours, theirs))
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-5)


def test_the_kernels_gradient_is_summed_in_float32():
    # 512 rows of 1 + 1/128 or, once, 1/128: their sum, 515, is no bfloat16 number.
    x = jnp.full((512, 1), 1 + 2**-7, jnp.bfloat16).at[0].set(2**-7)
    loss = lambda k: contract(x, k, Contraction(dtype="bfloat16", out_dtype="bfloat16")).astype(jnp.float32).sum()  # noqa: E731
    grad = jax.grad(loss)(jnp.ones((1, 1)))
    assert grad.dtype == jnp.float32
    assert float(grad[0, 0]) == 515.0


@pytest.mark.parametrize("num_in", [1, 2])
@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (2, 1)])
def test_bfloat16_dots_of_few_rows_are_the_float32_sum_rounded(rows, num_in):
    """A CPU computes a single row as one of two, and keeps the sum in float32 until the end."""
    rng = np.random.default_rng(0)
    inner = (64,) if num_in == 1 else (4, 16)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((*rows, *inner), (*inner, 24)))
    y = jax.jit(lambda x, k: contract(x, k, Contraction(num_in, "bfloat16", "bfloat16")))(x, kernel)
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(kernel, np.float64), num_in)
    assert y.dtype == jnp.bfloat16
    assert y.shape == exact.shape
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-4)


def test_a_cpu_never_multiplies_a_single_row_of_bfloat16():
    """XLA would widen the whole kernel to float32 first, at every step of decoding."""
    how = Contraction(dtype="bfloat16", out_dtype="bfloat16")
    x, kernel = jnp.ones((1, 1, 64), jnp.bfloat16), jnp.ones((64, 24), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda x, k: contract(x, k, how))(x, kernel)
    (dot,) = (own for own in equations(traced.jaxpr) if own.primitive.name == "dot_general")
    assert dot.invars[0].aval.shape == (2, 1, 1, 64)
    assert dot.outvars[0].aval.dtype == jnp.float32

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.nn.linear import Linear


def applied(layer, x):
    variables = layer.init(jax.random.key(0), x)
    boxes = variables["params"]
    return layer.apply(variables, x), {name: np.asarray(box.value) for name, box in boxes.items()}, boxes


def test_contracts_the_last_axes():
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 5))
    y, params, boxes = applied(Linear((6, 7), ("heads", "head_dim", "embed", "mlp"), num_in=2), x)
    np.testing.assert_allclose(y, np.einsum("btha,haij->btij", x, params["kernel"]), rtol=1e-5, atol=1e-5)
    assert boxes["kernel"].names == ("heads", "head_dim", "embed", "mlp")


def test_may_give_one_scalar_and_add_a_bias():
    layer = Linear((), ("importance",), use_bias=True)
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    _, params, boxes = applied(layer, x)
    assert params["bias"].shape == ()
    assert boxes["bias"].names == ()
    y = layer.apply({"params": {"kernel": params["kernel"], "bias": jnp.float32(2.0)}}, x)
    np.testing.assert_allclose(y, x @ params["kernel"] + 2.0, rtol=1e-5)


def test_computes_in_one_dtype_and_returns_another():
    x = jnp.ones((1, 512))
    layer = Linear((1,), ("embed", "vocab"), dtype="bfloat16", out_dtype="float32")
    y = layer.apply({"params": {"kernel": jnp.full((512, 1), 1 + 2**-7)}}, x)
    assert y.dtype == jnp.float32
    assert float(y[0, 0]) == 516.0  # 512 * (1 + 1/128): bfloat16, with 8 bits, has no 516 + small remainder either way
    assert applied(Linear((2,), ("embed", "mlp"), dtype="bfloat16"), x)[0].dtype == jnp.bfloat16

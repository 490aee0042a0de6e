import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.nn.embeddings import Embedding
from nn.layers import equations

TABLE = jnp.arange(12.0).reshape(4, 3)
LAYER, PARAMS = Embedding(4, 3), {"params": {"table": TABLE}}


def test_reads_rows():
    np.testing.assert_array_equal(LAYER.apply(PARAMS, jnp.array([[3, 0]])), [[[9, 10, 11], [0, 1, 2]]])


def test_an_id_past_the_table_reads_nan():
    read = LAYER.apply(PARAMS, jnp.array([3, 4]))
    assert bool(np.isfinite(read[0]).all())
    assert bool(np.isnan(read[1]).all())


def test_logits_are_inner_products_in_float32():
    x = jnp.array([[1.0, 0.0, 2.0]], jnp.bfloat16)
    logits = Embedding(4, 3, dtype="bfloat16").apply(PARAMS, x, method="logits")
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, [[4.0, 13.0, 22.0, 31.0]])


def test_a_cpu_never_multiplies_a_single_row_of_bfloat16_with_a_tied_head():
    """See the test of `contract` of the same name: a tied head is the largest matrix of a small model."""
    module, params = Embedding(24, 64, dtype="bfloat16"), {"params": {"table": jnp.ones((24, 64))}}
    logits = lambda x: module.apply(params, x, method="logits")  # noqa: E731
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64)), jnp.bfloat16)
    (dot,) = (own for own in equations(jax.make_jaxpr(logits)(x).jaxpr) if own.primitive.name == "dot_general")
    assert dot.invars[0].aval.shape == (2, 1, 64)
    np.testing.assert_allclose(jax.jit(logits)(x), np.full((1, 24), np.asarray(x, np.float64).sum()), rtol=1e-5)

import jax.numpy as jnp
import numpy as np

from anyexperts_jax.nn.embeddings import Embedding

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

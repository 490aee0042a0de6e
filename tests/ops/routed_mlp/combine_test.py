"""The TPU kernel for combine, in interpret mode: memory starts as NaN, and races are detected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from anyexperts_jax.ops.routed_mlp import pallas_combine
from anyexperts_jax.ops.routed_mlp.pallas_combine import TOKENS, combine
from tests.ops.routed_mlp.interpret import STRICT, check_races

ROWS, WIDTH = 24, 256


@functools.cache
def compiled(cores=1):
    interpret = pltpu.InterpretParams(num_cores_or_threads=cores, **STRICT)
    return jax.jit(functools.partial(combine, cores=cores, interpret=interpret))


def make_operands(tokens, slots, dtype=np.float32, *, held=0.6):
    """Rows without a slot are NaN, except for the neighbour of a held row, which shares words with it."""
    rng = np.random.default_rng(tokens)
    rows = np.where(rng.uniform(size=(tokens, slots)) < held, rng.integers(0, ROWS, (tokens, slots)), -1)
    y = rng.normal(size=(ROWS, WIDTH))
    unread = ~np.isin(np.arange(ROWS) // 2, rows[rows >= 0] // 2)
    y[unread] = np.nan
    weights = np.where(rows >= 0, rng.normal(size=rows.shape), np.nan)
    return jnp.asarray(y, dtype), jnp.asarray(weights, jnp.float32), jnp.asarray(rows, jnp.int32)


def expected(y, weights, rows):
    y, weights, rows = np.asarray(y, np.float64), np.asarray(weights, np.float64), np.asarray(rows)
    each = np.where((rows >= 0)[..., None], np.nan_to_num(weights)[..., None] * y[rows], 0)
    return each.sum(1)


def check(found, operands):
    jax.block_until_ready(found)
    check_races()
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(*operands), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("held", [0.6, 0.0, 1.0])
def test_values(dtype, held):
    operands = make_operands(2 * TOKENS + 3, 2, dtype, held=held)
    check(compiled()(*operands), operands)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2 * TOKENS])
def test_few_tokens_and_two_cores(tokens, cores):
    operands = make_operands(tokens, 2, jnp.bfloat16)
    check(compiled(cores)(*operands), operands)


def swapped(y, weights, rows):
    return y, weights[:, ::-1], rows


def neighbours(y, weights, rows):
    return y, weights, jnp.where(rows >= 0, rows ^ 1, rows)


def one_slot_less(y, weights, rows):
    return y, weights, rows.at[0, jnp.argmax(rows[0])].set(-1)


@pytest.mark.parametrize("fault", [swapped, neighbours, one_slot_less])
def test_wrong_operands_are_found(fault):
    operands = make_operands(2 * TOKENS + 3, 2, jnp.bfloat16, held=1.0)
    with pytest.raises(AssertionError):
        check(compiled()(*fault(*operands)), operands)


def test_pairs_are_what_a_bitcast_of_the_kernel_makes():
    y = jnp.arange(4 * 128, dtype=jnp.bfloat16).reshape(4, 128)

    def kernel(y_ref, words_ref):
        words_ref[...] = pltpu.bitcast(y_ref[...], jnp.uint32)

    words = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((2, 128), jnp.uint32), interpret=pltpu.InterpretParams()
    )(y)
    np.testing.assert_array_equal(words, pallas_combine._pairs(y))

"""Pallas kernel for TPU that combines: fetches each token's rows of a buffer, weights them and adds them in float32.

A grid step handles a few tokens. Their rows are copied from HBM one by one; the next step's rows are on their way while
this step adds. Slots that are not held start no copy. Two bfloat16 rows share their 32-bit words in TPU memory, so
the pair is fetched and one half is used.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

TOKENS = 16  # tokens per grid step
_CHUNK = 2048  # columns added at a time; their sums fill half of the vector registers
_HIGH_HALF = -65536  # mask of the upper 16 bits: a bfloat16 there is the float32 of the same value


def combine(
    y_RD: Float[Array, "R D"],
    weights_NK: Shaped[Array, "N K"],
    rows_NK: Int[Array, "N K"],
    *,
    cores: int = 1,
    vmem_bytes: int | None = None,
    interpret: Any = False,
) -> Float[Array, "N D"]:
    """sum_k weights_NK[n, k] * y_RD[rows_NK[n, k]] in float32. Slots with row -1 add nothing and are not read.

    y is float32, or bfloat16 with an even number of rows; D is a multiple of 128. The cores share the tokens.
    """
    num_tokens, width, packed = rows_NK.shape[0], y_RD.shape[1], y_RD.dtype == jnp.bfloat16
    if packed and interpret:
        y_RD = _pairs(y_RD)  # interpret mode cannot copy from a bitcast reference
    padding = ((0, -num_tokens % (TOKENS * cores)), (0, 0))
    rows_NK = jnp.pad(rows_NK.astype(jnp.int32), padding, constant_values=-1)
    weights_NK = jnp.pad(weights_NK.astype(jnp.float32), padding)
    k, steps = rows_NK.shape[1], rows_NK.shape[0] // (TOKENS * cores)
    # The rows of a step in the order of the kernel's buffer: the first slot of all its tokens, then the second, and so
    # on, so that one slot's rows are contiguous there. The last entry is the number of rows.
    lists = rows_NK.reshape(-1, TOKENS, k).swapaxes(1, 2).reshape(-1, 1, TOKENS * k)
    lists = jnp.concatenate([lists, (lists >= 0).sum(-1, keepdims=True, dtype=lists.dtype)], axis=-1)
    list_of = functools.partial(pl.BlockSpec, (None, 1, TOKENS * k + 1), memory_space=pltpu.SMEM)
    of_tokens = functools.partial(pl.BlockSpec, index_map=lambda core, i: (core * steps + i, 0))
    sum_ND = pl.pallas_call(
        functools.partial(_kernel, packed=packed),
        name="combine_rows",
        grid=(cores, steps),
        in_specs=[
            # The same lists twice: this step's, and the next step's for fetching ahead.
            list_of(lambda core, i: (core * steps + i, 0, 0)),
            list_of(lambda core, i: (core * steps + jnp.minimum(i + 1, steps - 1), 0, 0)),
            of_tokens((TOKENS, k)),
            of_tokens((TOKENS, k)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=of_tokens((TOKENS, width)),
        out_shape=jax.ShapeDtypeStruct((rows_NK.shape[0], width), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((2, k * TOKENS, width), jnp.uint32 if packed else jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        # Bounds checks would cost scalar work for every row; rows are valid or -1, and -1 starts no copy.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes, disable_bounds_checks=True
        ),
        interpret=interpret,
    )(lists, lists, rows_NK, weights_NK, y_RD)
    return sum_ND[:num_tokens]


def _kernel(  # type: ignore[no-untyped-def]
    now_ref, after_ref, rows_ref, weights_ref, y_ref, sum_ref, fetched_ref, semaphores, *, packed
):
    step, last = pl.program_id(1), pl.num_programs(1) - 1
    words_ref = y_ref.bitcast(jnp.uint32) if y_ref.dtype == jnp.bfloat16 else y_ref

    def fetch(list_ref: Any, half: Any) -> None:
        def start_copies(k: Any, _: None) -> None:
            for token in range(TOKENS):
                place = k * TOKENS + token
                row = list_ref[0, place]
                source = words_ref.at[pl.ds(row >> 1 if packed else row, 1)]
                target = fetched_ref.at[half, pl.ds(place, 1)]
                pl.when(row >= 0)(pltpu.make_async_copy(source, target, semaphores.at[half]).start)

        lax.fori_loop(0, (list_ref.shape[1] - 1) // TOKENS, start_copies, None)

    def wait(list_ref: Any, half: Any) -> None:
        """Waits for all rows of the list. A semaphore counts bytes, so one wait per bit of their number is enough."""
        places = list_ref.shape[1] - 1
        for rows in (2**bit for bit in range(places.bit_length())):
            some = fetched_ref.at[half, pl.ds(0, rows)]
            pl.when(list_ref[0, places] & rows > 0)(pltpu.make_async_copy(some, some, semaphores.at[half]).wait)

    @pl.when(step == 0)
    def _() -> None:
        fetch(now_ref, 0)

    @pl.when(step < last)
    def _() -> None:
        fetch(after_ref, (step + 1) % 2)

    half = step % 2
    wait(now_ref, half)
    rows, weights = rows_ref[...], jnp.where(rows_ref[...] >= 0, weights_ref[...], 0)
    for start in range(0, sum_ref.shape[1], _CHUNK):
        columns = slice(start, min(start + _CHUNK, sum_ref.shape[1]))
        total = jnp.zeros((TOKENS, columns.stop - start), jnp.float32)
        for k in range(rows.shape[1]):
            value = fetched_ref[half, k * TOKENS : (k + 1) * TOKENS, columns]
            total += _to_float32(value, rows[:, k : k + 1]) * weights[:, k : k + 1]
        sum_ref[:, columns] = total


def _to_float32(words: Any, row: Any) -> Any:
    """The fetched words as float32, zero where `row` is -1: what the buffer holds there may be NaN. In a pair of
    bfloat16 rows the even row is the lower half of each word and the odd row the upper half."""
    if words.dtype == jnp.float32:
        return jnp.where(row >= 0, words, 0)
    shift = jnp.broadcast_to(jnp.where(row % 2 == 0, 16, 0), words.shape)
    mask = jnp.broadcast_to(jnp.where(row >= 0, _HIGH_HALF, 0), words.shape)
    words = lax.bitcast_convert_type(words, jnp.int32)
    return lax.bitcast_convert_type(lax.shift_left(words, shift) & mask, jnp.float32)


def _pairs(y_RD: Array) -> Array:
    """Packs two bfloat16 rows into one row of 32-bit words, as in a TPU's memory."""
    pairs = y_RD.reshape(-1, 2, y_RD.shape[1]).swapaxes(1, 2)
    return lax.bitcast_convert_type(pairs, jnp.uint32)

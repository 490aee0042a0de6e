"""The TPU kernels in interpret mode: memory starts as NaN, reads past an array give NaN, races are found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.ops.expert_mlp import pallas_tpu, tpu_grid
from anyexperts_jax.ops.expert_mlp.tiles import list_tiles
from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes, TpuSizes
from anyexperts_jax.ops.expert_mlp.vjp_tpu import TpuOptions, expert_mlp_pallas_tpu
from tests.ops.expert_mlp.cases import BLOCK, COUNTS, check, make_operands, run

STRICT = {"detect_races": True, "uninitialized_memory": "nan", "out_of_bounds_reads": "uninitialized"}


def options(*, columns=None, weight_columns=None, slab=16, block=BLOCK, cores=1, residuals="saved", inner=None):
    rows = KernelSizes(block, slab, 8, columns, inner)
    sizes = TpuSizes(rows, rows, KernelSizes(block, slab, 8, weight_columns), cores, 2**20)
    interpret = pltpu.InterpretParams(num_cores_or_threads=cores, **STRICT)
    return TpuOptions(residuals=residuals, sizes=sizes, interpret=interpret)


FUSED = options()
PAIR = options(columns=128, weight_columns=128)


@functools.cache
def compiled(chosen):
    """One program for all counts of a shape."""
    return jax.jit(functools.partial(run, functools.partial(expert_mlp_pallas_tpu, options=chosen)))


def check_kernels(operands, chosen, program=None):
    results = jax.block_until_ready((program or compiled(chosen))(operands))
    races = interpret_pallas_call.races
    assert races is None or not races.races_found
    check(results, operands)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_fused_kernels(counts):
    check_kernels(make_operands(counts), FUSED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["around a block", "no rows at all"])
def test_kernels_that_keep_a_part_of_the_columns(name):
    """384 columns as three blocks of 128, or as two of 256 that reach beyond the array."""
    chosen = options(columns=256, weight_columns=128) if name == "around a block" else PAIR
    check_kernels(make_operands(COUNTS[name], width=256, hidden=384), chosen)


@pytest.mark.slow
def test_hidden_columns_summed_in_parts_of_which_the_last_is_short():
    check_kernels(make_operands((0, 17, 40), hidden=384), options(inner=256))


@pytest.mark.parametrize("residuals", ["saved", "recomputed"])
@pytest.mark.parametrize("columns", [None, 128])
def test_residuals_and_bfloat16(residuals, columns):
    chosen = options(columns=columns, residuals=residuals)
    check_kernels(make_operands((0, 17, 40), jnp.bfloat16), chosen)


@pytest.mark.slow
@pytest.mark.parametrize(("capacity", "width", "hidden"), [(5, 20, 136), (40, 200, 128)])
def test_widths_that_are_no_multiple_of_a_tile(capacity, width, hidden):
    chosen = options(block=16) if capacity < 16 else FUSED
    check_kernels(make_operands((capacity, 0, 3), capacity=capacity, width=width, hidden=hidden), chosen)


@pytest.mark.slow
def test_one_pass_an_expert_needs_no_sum_across_tiles():
    check_kernels(make_operands((0, 40, 7, 33)), options(block=40, slab=40))


@pytest.mark.slow
def test_two_cores_share_an_odd_list():
    check_kernels(make_operands((40, 40, 5, 0, 17), capacity=32), options(cores=2))


@pytest.mark.slow
def test_counts_past_the_buffer_mean_all_rows():
    operands = make_operands((40, 40, 40))
    results = compiled(FUSED)(operands._replace(counts_E=operands.counts_E + 5))
    check(results, operands)


def test_live_rows_are_copied_by_chunks_where_sizes_allow():
    tile, expert = tpu_grid.Block("tile", 320, 512), tpu_grid.Block("expert", 320, 512)
    assert tpu_grid.chunk_rows(tile, 320, 512) == 64
    assert tpu_grid.chunk_rows(tile._replace(rows=BLOCK), 48, 512) == 16
    assert tpu_grid.chunk_rows(tile, 336, 512) == 0, "20 chunks of 16 rows are too many branches"
    assert tpu_grid.chunk_rows(tile, 320, 768) == 0, "the last part of the columns reaches past the array"
    assert tpu_grid.chunk_rows(expert, 320, 512) == 0


# Tests of the tests: a kernel that is wrong must not pass.


def swapped(x, counts, w_gate, w_up, w_down):
    return expert_mlp_pallas_tpu(x, counts, w_up, w_gate, w_down, options=FUSED)


def one_row_more(x, counts, *weights):
    return expert_mlp_pallas_tpu(x, counts + 1, *weights, options=FUSED)


def one_row_less(x, counts, *weights):
    return expert_mlp_pallas_tpu(x, counts - 1, *weights, options=FUSED)


@pytest.mark.parametrize("wrong", [swapped, one_row_more, one_row_less])
def test_wrong_operands_are_found(wrong):
    with pytest.raises(AssertionError):
        check_kernels(make_operands((0, 17, 3)), FUSED, jax.jit(functools.partial(run, wrong)))


@pytest.mark.slow
def test_a_stale_list_of_tiles_is_found(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "list_tiles", lambda counts, *sizes: list_tiles(jnp.roll(counts, 1), *sizes))
    op = functools.partial(expert_mlp_pallas_tpu, options=FUSED)
    with pytest.raises(AssertionError):
        check_kernels(make_operands((0, 17, 3)), FUSED, jax.jit(functools.partial(run, op)))


@pytest.mark.slow
def test_a_copy_that_stops_short_is_found(monkeypatch):
    whole = tpu_grid.Copied.for_each_chunk

    def first_chunk(copied, *where):
        whole(copied._replace(block=copied.block._replace(rows=copied.chunk)), *where)

    monkeypatch.setattr(tpu_grid.Copied, "for_each_chunk", first_chunk)
    op = functools.partial(expert_mlp_pallas_tpu, options=FUSED)
    with pytest.raises(AssertionError):
        check_kernels(make_operands((0, 17, 3)), FUSED, jax.jit(functools.partial(run, op)))


@pytest.mark.slow
def test_an_unmasked_weight_gradient_is_found(monkeypatch):
    monkeypatch.setattr(tpu_grid.Slab, "mask", lambda slab, value: value)
    op = functools.partial(expert_mlp_pallas_tpu, options=FUSED)
    with pytest.raises(AssertionError):
        check_kernels(make_operands((0, 17, 3)), FUSED, jax.jit(functools.partial(run, op)))


def test_other_dtypes_are_refused():
    operands = make_operands((1, 2), np.float16)
    with pytest.raises(
        UserError, match=r"^implementation='pallas_tpu' takes bfloat16 or float32 and x is float16; cast it or use "
    ):
        expert_mlp_pallas_tpu(*operands[:5], options=FUSED)

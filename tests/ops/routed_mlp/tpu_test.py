"""The TPU kernels over the block-aligned buffer in interpret mode: memory starts as NaN, races are found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.ops.expert_mlp import pallas_tpu
from anyexperts_jax.ops.expert_mlp.reference import aligned_mlp
from anyexperts_jax.ops.expert_mlp.tiles import list_aligned_tiles
from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes, TpuSizes
from anyexperts_jax.ops.expert_mlp.vjp_tpu import TpuOptions
from anyexperts_jax.ops.routed_mlp import tpu
from tests.ops.expert_mlp.cases import BLOCK, COUNTS, Results, check, make_operands
from tests.ops.routed_mlp.aligned_cases import FAULTS, run_kernels, to_buffer, to_experts
from tests.ops.routed_mlp.interpret import check_races, options

FUSED = options()


def kernels(chosen):
    return tpu._kernels(chosen.sizes, chosen.interpret)


@functools.cache
def compiled(chosen, keep=True):
    """One program for all counts that fill the same number of rows."""
    return jax.jit(functools.partial(run_kernels, kernels(chosen), keep=keep))


def check_buffer(operands, chosen=FUSED, program=None, broken=None):
    buffer = to_buffer(operands, tpu.buffer_block(chosen.sizes))
    given = buffer if broken is None else broken(buffer)
    results = jax.block_until_ready((program or compiled(chosen))(given))
    check_races()
    check(to_experts(results, buffer, operands.x_ECD.shape[1]), operands)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_kernels(counts):
    check_buffer(make_operands(counts))


@pytest.mark.parametrize(("columns", "keep"), [(None, False), (128, True), (128, False)])
def test_in_parts_and_bfloat16(columns, keep):
    chosen = options(columns=columns, weight_columns=columns)
    operands = make_operands((0, 17, 40), jnp.bfloat16, width=256 if columns else 128)
    check_buffer(operands, chosen, compiled(chosen, keep))


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(40, 5, 0, 17), (0, 7, 0)])
def test_two_cores_share_an_odd_list_or_one_tile(counts):
    check_buffer(make_operands(counts), options(cores=2))


def test_blocks_of_the_kernels_may_be_parts_of_the_buffers():
    small, large = KernelSizes(16, 16, 8), KernelSizes(32, 16, 8)
    chosen = TpuOptions(sizes=TpuSizes(small, large, small, 1, 2**20), interpret=FUSED.interpret)
    check_buffer(make_operands((1, 16, 17, 40)), chosen)


def test_dead_rows_of_live_tiles_are_zero():
    operands = make_operands(COUNTS["around a block"])
    buffer = to_buffer(operands, BLOCK)
    results = compiled(FUSED)(buffer)
    row_R1 = np.arange(buffer.x_RD.shape[0])[:, None]
    starts, counts = np.asarray(buffer.starts_E), np.asarray(buffer.counts_E)
    in_tiles = (row_R1 >= starts + counts) & (row_R1 < starts + -(-counts // BLOCK) * BLOCK)
    for a in results[:2]:
        assert not np.any(np.asarray(a)[in_tiles.any(1)])


def test_the_reference_of_the_buffer_is_the_definition():
    operands = make_operands(COUNTS["around a block"])
    buffer = to_buffer(operands, BLOCK)
    x, starts, counts, experts, d_y = buffer
    y, pull = jax.vjp(lambda x, *w: aligned_mlp(x, starts, counts, *w), jnp.nan_to_num(x), *experts)
    results = Results(y, *pull(jnp.nan_to_num(d_y)))
    check(to_experts(results, buffer, operands.x_ECD.shape[1]), operands)
    dead = np.isnan(np.asarray(x)).all(1)
    assert not np.any(np.asarray(y)[dead])
    assert not np.any(np.asarray(results.d_x_ECD)[dead])


# Tests of the tests: what is wrong must not pass.

SMALL = (0, 17, 3)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_wrong_operands_are_found(fault):
    with pytest.raises(AssertionError):
        check_buffer(make_operands(SMALL), broken=fault)


def test_a_stale_list_of_tiles_is_found(monkeypatch):
    def stale(starts, counts, *sizes, empty):
        return list_aligned_tiles(starts, jnp.roll(counts, 1), *sizes, empty=empty)

    monkeypatch.setattr(pallas_tpu, "list_aligned_tiles", stale)
    with pytest.raises(AssertionError):
        check_buffer(make_operands(SMALL), program=jax.jit(functools.partial(run_kernels, kernels(FUSED))))

"""The TPU kernels over the block-aligned buffer in interpret mode: memory starts as NaN, races are found."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.expert_mlp import pallas_tpu
from anyexperts_jax.ops.expert_mlp.reference import aligned_mlp
from anyexperts_jax.ops.expert_mlp.tiles import list_aligned_tiles
from anyexperts_jax.ops.expert_mlp.tpu_sizes import CHIPS, KernelSizes, Shape, TpuSizes
from anyexperts_jax.ops.expert_mlp.vjp_tpu import TpuOptions
from anyexperts_jax.ops.routed_mlp import routed_mlp, tpu
from tests.dispatch import plans
from tests.ops.expert_mlp.cases import BLOCK, COUNTS, Results, check, make_operands
from tests.ops.routed_mlp.aligned_cases import run_kernels, to_buffer, to_experts

STRICT = {"detect_races": True, "uninitialized_memory": "nan", "out_of_bounds_reads": "uninitialized"}


def options(*, columns=None, weight_columns=None, slab=16, block=BLOCK, cores=1):
    rows = KernelSizes(block, slab, 8, columns)
    sizes = TpuSizes(rows, rows, KernelSizes(block, slab, 8, weight_columns), cores, 2**20)
    return TpuOptions(sizes=sizes, interpret=pltpu.InterpretParams(num_cores_or_threads=cores, **STRICT))


FUSED = options()
SHORT = options(block=16)


def kernels(chosen):
    return tpu._kernels(chosen.sizes, chosen.interpret)


@functools.cache
def compiled(chosen, keep=True):
    """One program for all counts that fill the same number of rows."""
    return jax.jit(functools.partial(run_kernels, kernels(chosen), keep=keep))


def check_races():
    races = interpret_pallas_call.races
    assert races is None or not races.races_found


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
FAULTS = {
    "gate and up swapped": lambda b: b._replace(experts=(b.experts[1], b.experts[0], b.experts[2])),
    "experts swapped": lambda b: b._replace(experts=tuple(w[::-1] for w in b.experts)),
    "a count too many": lambda b: b._replace(counts_E=b.counts_E + 1),
    "a count too few": lambda b: b._replace(counts_E=jnp.maximum(b.counts_E - 1, 0)),
    "starts of others": lambda b: b._replace(starts_E=b.starts_E[::-1]),
}


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


# The whole op.


def value_and_gradients(plan, operands, run):
    def total(x, slot_weights, *weights):
        order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
        y = run(x, slot_weights, order, *weights)
        return jnp.sin(y).sum(), y

    x, *weights = operands
    (_, y), gradients = jax.value_and_grad(total, range(5), has_aux=True)(x, plan.weights_NK, *weights)
    return y, *gradients


@pytest.mark.parametrize(("name", "columns"), [("random", None), ("random", 128), ("all slots virtual", None)])
def test_routed_mlp(name, columns):
    """Widths that are no multiple of a tile, against the oracle in float64."""
    plan = plans.make_plan(plans.PLANS[name].expert_ids_NK, virtual_output="zero")
    operands = plans.make_operands(plan.expert_ids_NK.shape[0])
    chosen = SHORT if columns is None else options(block=16, columns=columns)
    run = jax.jit(
        functools.partial(value_and_gradients, run=functools.partial(tpu.routed_mlp_pallas_tpu, options=chosen))
    )
    found = jax.block_until_ready(run(plan, operands))
    check_races()
    y, (d_x, d_slots, _, *d_weights) = plans.oracle_value_and_gradients(plan, operands)
    for a, b in zip(found, (y, d_x, d_slots, *d_weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    assert found[0].dtype == jnp.float32


def test_a_slot_of_weight_zero_has_its_gradient_and_a_wrong_weight_is_found():
    plan = plans.make_plan(plans.PLANS["random"].expert_ids_NK, virtual_output="zero")
    slot = np.argwhere(np.asarray(plan.expert_ids_NK) < plans.EXPERTS)[0]
    plan = dataclasses.replace(plan, weights_NK=plan.weights_NK.at[tuple(slot)].set(0))
    operands = plans.make_operands(plan.expert_ids_NK.shape[0])
    run = jax.jit(
        functools.partial(value_and_gradients, run=functools.partial(tpu.routed_mlp_pallas_tpu, options=SHORT))
    )
    _, (_, wanted, *_) = plans.oracle_value_and_gradients(plan, operands)
    assert abs(wanted[tuple(slot)]) > 0.01
    np.testing.assert_allclose(run(plan, operands)[2], wanted, rtol=1e-4, atol=2e-5)
    wrong = dataclasses.replace(plan, weights_NK=plan.weights_NK.at[tuple(slot)].set(1))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(run(wrong, operands)[2], wanted, rtol=1e-4, atol=2e-5)


# Sizes and refusals.


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("slots", [1, 40, 128, 384, 1000, 10**5])
def test_any_load_has_sizes_whose_blocks_fit_each_other(chip, slots):
    for width, hidden, itemsize in ((2048, 512, 2), (2048, 1408, 2), (4096, 14336, 2), (1024, 640, 4)):
        sizes = tpu.aligned_sizes(CHIPS[chip], Shape(slots, width, hidden, itemsize))
        assert tpu.buffer_block(sizes) == max(sizes.forward.block, sizes.backward.block, sizes.weights.block)
        assert 16 <= tpu.buffer_block(sizes) <= max(16, slots / 2)


def test_what_cannot_run_is_refused():
    plan = plans.PLANS["random"]
    x, *weights = plans.make_operands(12)
    order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
    message = r"^implementation='pallas_tpu' needs a TPU and the platform is 'cpu'; use implementation='xla'$"
    with pytest.raises(UserError, match=message):
        routed_mlp(x, plan.weights_NK, order, *weights, "pallas_tpu")

"""The Triton kernels in interpret mode, where uninitialised buffers hold NaN."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.ops.expert_mlp import expert_mlp, pallas_triton, reference
from anyexperts_jax.ops.expert_mlp.gpu_passes import GpuOptions
from anyexperts_jax.ops.expert_mlp.gpu_tiles import Tiles, TritonTile
from anyexperts_jax.ops.expert_mlp.vjp_gpu import expert_mlp_triton
from tests.nn.layers import equations
from tests.ops.expert_mlp.cases import expected, make_operands, run
from tests.ops.expert_mlp.gpu_cases import check, counts_cases

BLOCK, CAPACITY = 16, 33  # the smallest tiles the kernels take
COUNTS = counts_cases(BLOCK, CAPACITY)
SIZES = {"capacity": CAPACITY, "width": 20, "hidden": 24}  # none a multiple of the tile
SMALL = Tiles(*(TritonTile(m=BLOCK, n=16, k=16, warps=4, stages=2),) * 6)
OPTIONS = GpuOptions(tiles=SMALL, interpret=True)
DTYPES = [np.float32, jnp.bfloat16]


@functools.cache
def compiled(options=OPTIONS):
    """One program for all counts of a shape."""
    return jax.jit(functools.partial(run, functools.partial(expert_mlp_triton, options=options)))


def test_the_float64_cases_are_the_reference():
    operands = make_operands(COUNTS["around a block"], np.float32, **SIZES)
    x, d_y = jnp.nan_to_num(operands.x_ECD), jnp.nan_to_num(operands.d_y_ECD)
    operands = operands._replace(x_ECD=x, d_y_ECD=d_y)
    check(run(reference.expert_mlp, operands), expected(operands), np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_values_and_gradients(counts, dtype):
    operands = make_operands(counts, dtype, **SIZES)
    check(compiled()(operands), expected(operands), dtype)


def test_shapes_that_are_whole_tiles():
    operands = make_operands((0, 5, 2 * BLOCK), np.float32, capacity=2 * BLOCK, width=32, hidden=16)
    check(compiled()(operands), expected(operands), np.float32)


# Every axis of every kernel has several tiles, the last one cut, and no two of its sizes can be taken for each other.
UNEVEN = Tiles(*(TritonTile(*sizes, warps=4, stages=2) for sizes in itertools.permutations((16, 32, 64))))
UNEVEN_SIZES = {"capacity": 70, "width": 72, "hidden": 88}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_three_lengths_that_differ_in_every_kernel(dtype):
    operands = make_operands((0, 5, 33, 70), dtype, **UNEVEN_SIZES)
    check(compiled(dataclasses.replace(OPTIONS, tiles=UNEVEN))(operands), expected(operands), dtype)


def test_every_kernel_is_cut_by_its_own_tile():
    operands = make_operands((0, 5, 33, 70), np.float32, **UNEVEN_SIZES)
    program = jax.make_jaxpr(compiled(dataclasses.replace(OPTIONS, tiles=UNEVEN)))(operands)
    calls = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "pallas_call"]
    C, D, F = UNEVEN_SIZES.values()
    results = Tiles(gate_up=(C, F), down=(C, D), d_gate_up=(C, F), d_x=(C, D), d_w_gate_up=(D, F), d_w_down=(F, D))
    grids = [(-(-rows // tile.m), -(-cols // tile.n), 4) for (rows, cols), tile in zip(results, UNEVEN, strict=True)]
    assert [call.params["grid_mapping"].grid for call in calls] == grids
    assert len(set(grids)) == len(grids)  # no two can be taken for each other


def test_shapes_below_one_tile():
    operands = make_operands((0, 2, 3), np.float32, capacity=3, width=5, hidden=4)
    check(compiled()(operands), expected(operands), np.float32)


def test_recomputed_activations_change_nothing():
    operands = make_operands(COUNTS["around a block"], jnp.bfloat16, **SIZES)
    again = compiled(dataclasses.replace(OPTIONS, residuals="recomputed"))(operands)
    chex.assert_trees_all_equal(again, compiled()(operands))


def test_counts_past_the_buffer_mean_all_rows():
    operands = make_operands(COUNTS["all full"], np.float32, **SIZES)
    check(compiled()(operands._replace(counts_E=operands.counts_E + 5)), expected(operands), np.float32)


@pytest.mark.parametrize(
    "fault",
    [
        lambda o: o._replace(w_gate_EDF=o.w_up_EDF, w_up_EDF=o.w_gate_EDF),
        lambda o: o._replace(w_down_EFD=o.w_down_EFD[::-1]),
        lambda o: o._replace(counts_E=o.counts_E + 1),
        lambda o: o._replace(counts_E=jnp.maximum(o.counts_E - 1, 0)),
        lambda o: o._replace(counts_E=o.counts_E[::-1]),
    ],
    ids=["gate and up swapped", "experts swapped", "counts too high", "counts too low", "counts swapped"],
)
def test_the_checks_catch(fault):
    operands = make_operands(COUNTS["around a block"], np.float32, **SIZES)
    with pytest.raises(AssertionError):
        check(compiled()(fault(operands)), expected(operands), np.float32)


def test_the_checks_catch_kernels_that_forget_the_row_mask(monkeypatch):
    inside = pallas_triton._inside
    monkeypatch.setattr(pallas_triton, "_inside", lambda *args: inside(*args[:-1], None))
    operands = make_operands((0, 1, BLOCK - 1), np.float32, **SIZES)
    broken = jax.jit(lambda o: run(functools.partial(expert_mlp_triton, options=OPTIONS), o))
    with pytest.raises(AssertionError):
        check(broken(operands), expected(operands), np.float32)


def test_errors_say_why_and_what_to_do():
    operands = make_operands((CAPACITY,), np.float32, **SIZES)[:-1]
    message = "implementation='pallas_triton' needs an NVIDIA GPU and this runs on cpu; use implementation='xla'"
    with pytest.raises(UserError, match=f"^{message}$"):
        expert_mlp(*operands, implementation="pallas_triton")
    half = (operands[0].astype(jnp.float16), operands[1], *(w.astype(jnp.float16) for w in operands[2:]))
    with pytest.raises(UserError, match=r"takes bfloat16 or float32 and x is float16; cast it or use "):
        expert_mlp_triton(*half, OPTIONS)
    with pytest.raises(UserError, match=r"^residuals='all' is unknown; valid: saved, recomputed$"):
        GpuOptions(residuals="all")

"""The GPU kernels over the block-aligned buffer in interpret mode: uninitialised buffers hold NaN, and races raise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.expert_mlp import pallas_gpu, pallas_triton
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import gpu, routed_mlp
from tests.dispatch import plans
from tests.ops.expert_mlp import pallas_gpu_test as mosaic
from tests.ops.expert_mlp import pallas_triton_test as triton
from tests.ops.expert_mlp.cases import expected, make_operands
from tests.ops.expert_mlp.gpu_cases import check
from tests.ops.routed_mlp.aligned_cases import FAULTS, run_kernels, to_buffer, to_experts
from tests.ops.routed_mlp.routed_cases import value_and_gradients

KERNELS = {"triton": (pallas_triton, triton.OPTIONS), "mosaic": (pallas_gpu, mosaic.OPTIONS)}


@functools.cache
def compiled(module, take=False):
    """One program for all counts that fill the same number of rows."""
    return jax.jit(functools.partial(run_kernels, gpu.aligned_kernels(*KERNELS[module]), take=take))


def check_buffer(module, operands, broken=lambda buffer: buffer, program=None):
    buffer = to_buffer(operands, gpu.buffer_block(KERNELS[module][1].tiles))
    results = to_experts((program or compiled(module))(broken(buffer)), buffer, operands.x_ECD.shape[1])
    check(results, expected(operands), operands.x_ECD.dtype)


@pytest.mark.parametrize("counts", triton.COUNTS.values(), ids=triton.COUNTS)
def test_triton_kernels(counts):
    check_buffer("triton", make_operands(counts, **triton.SIZES))


@pytest.mark.parametrize("counts", triton.COUNTS.values(), ids=triton.COUNTS)
def test_triton_kernels_that_read_tokens(counts):
    check_buffer("triton", make_operands(counts, **triton.SIZES), program=compiled("triton", take=True))


def test_triton_kernels_in_bfloat16():
    check_buffer("triton", make_operands(triton.COUNTS["around a block"], jnp.bfloat16, **triton.SIZES))


@mosaic.needs_new_jax
@pytest.mark.parametrize("counts", [(0, 1, 127, 0, 128, 129), (0, 0)])
def test_mosaic_kernels(counts):
    check_buffer("mosaic", make_operands(counts, jnp.bfloat16, capacity=130, width=64, hidden=128))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_wrong_operands_are_found(fault):
    with pytest.raises(AssertionError):
        check_buffer("triton", make_operands((0, 17, 3), **triton.SIZES), fault)


@mosaic.needs_new_jax
@pytest.mark.parametrize("fault", ["counts too high", "starts reversed"])
def test_wrong_operands_of_mosaic_kernels_are_found(fault):
    with pytest.raises(AssertionError):
        check_buffer("mosaic", make_operands((3, 0), jnp.bfloat16, capacity=8, width=64, hidden=64), FAULTS[fault])


@mosaic.needs_new_jax
def test_the_checks_catch_dead_rows_that_reach_a_sum(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "clean", lambda a, rows: a)
    program = jax.jit(functools.partial(run_kernels, gpu.aligned_kernels(*KERNELS["mosaic"])))
    with pytest.raises(AssertionError):
        check_buffer("mosaic", make_operands((3,), jnp.bfloat16, capacity=8, width=64, hidden=64), program=program)


@pytest.mark.parametrize(
    ("op", "options", "dtype"),
    [
        (gpu.routed_mlp_triton, triton.OPTIONS, np.float32),
        pytest.param(gpu.routed_mlp_mosaic, mosaic.OPTIONS, jnp.bfloat16, marks=mosaic.needs_new_jax),
    ],
    ids=["triton", "mosaic"],
)
def test_routed_mlp(op, options, dtype):
    """Widths that are no multiple of a tile, against the oracle in float64."""
    plan = plans.make_plan(plans.PLANS["random"].expert_ids_NK, virtual_output="zero")
    operands = plans.make_operands(plan.expert_ids_NK.shape[0], dtype=dtype)
    run = jax.jit(functools.partial(value_and_gradients, run=functools.partial(op, options=options)))
    y, (d_x, d_slots, _, *d_weights) = plans.oracle_value_and_gradients(plan, operands)
    found = run(plan, operands)
    assert (found[0].dtype, found[1].dtype) == (jnp.float32, dtype)
    tolerance = 2e-5 if dtype == np.float32 else 2e-2  # a few roundings of bfloat16
    for a, b in zip(found, (y, d_x, d_slots, *d_weights), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_triton"])
def test_kernels_that_cannot_run_here_are_refused(implementation):
    if implementation == "pallas_gpu" and not mosaic.NEW_JAX:
        pytest.skip("an old JAX is what is refused first")
    plan = plans.PLANS["random"]
    x, *weights = plans.make_operands(12)
    order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
    with pytest.raises(UserError, match=rf"^implementation='{implementation}' needs an? \w+ GPU and this runs on cpu"):
        routed_mlp(x, plan.weights_NK, order, ExpertWeights(*weights), implementation=implementation)

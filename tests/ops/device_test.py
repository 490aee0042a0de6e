"""The shared cases on an attached GPU or TPU, not interpreted: `pytest -m gpu`, `pytest -m tpu`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.ops._gpu import gpu_kind, is_hopper
from anyexperts_jax.ops.expert_mlp import expert_mlp
from anyexperts_jax.ops.routed_mlp import routed_mlp
from tests.dispatch import plans
from tests.ops.expert_mlp.cases import COUNTS, check, expected, make_operands, run
from tests.ops.expert_mlp.gpu_cases import check as check_each_expert
from tests.ops.expert_mlp.gpu_cases import counts_cases
from tests.ops.routed_mlp.routed_cases import value_and_gradients

BLOCK = 128  # rows of the tiles that the GPU kernels choose
CAPACITY = 2 * BLOCK + 8
GPU_COUNTS = counts_cases(BLOCK, CAPACITY)


@functools.cache
def compiled(implementation):
    """One program for all counts of a shape."""
    return jax.jit(functools.partial(run, functools.partial(expert_mlp, implementation=implementation)))


def skip_unless_it_runs(implementation):
    if implementation == "pallas_gpu" and not is_hopper(gpu_kind()):
        pytest.skip(f"needs a Hopper GPU; this is {gpu_kind()}")


@pytest.mark.gpu
@pytest.mark.parametrize("counts", GPU_COUNTS.values(), ids=GPU_COUNTS)
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("pallas_gpu", jnp.bfloat16), ("pallas_triton", jnp.bfloat16), ("pallas_triton", np.float32)],
)
@pytest.mark.parametrize(("width", "hidden"), [(192, 320), (200, 136)])
def test_gpu_kernels(implementation, dtype, counts, width, hidden):
    skip_unless_it_runs(implementation)
    operands = make_operands(counts, dtype, capacity=CAPACITY, width=width, hidden=hidden)
    # float32 is multiplied as TF32, whose 2**-11 is nearer to bfloat16's rounding than to float32's
    check_each_expert(compiled(implementation)(operands), expected(operands), dtype, tolerance=1e-2)


@pytest.mark.tpu
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
@pytest.mark.parametrize(("width", "hidden"), [(256, 384), (200, 136)])
def test_tpu_kernels(dtype, counts, width, hidden):
    operands = make_operands(counts, dtype, width=width, hidden=hidden)
    check(compiled("pallas_tpu")(operands), operands)


@pytest.mark.parametrize("name", ["random", "many tokens", "experts without tokens", "all slots virtual"])
@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param("pallas_gpu", marks=pytest.mark.gpu),
        pytest.param("pallas_triton", marks=pytest.mark.gpu),
        pytest.param("pallas_tpu", marks=pytest.mark.tpu),
    ],
)
def test_dropless(implementation, name):
    """In bfloat16, which all of them support, against the float64 oracle on the same rounded operands."""
    skip_unless_it_runs(implementation)
    plan = plans.make_plan(plans.PLANS[name].expert_ids_NK, virtual_output="zero")
    operands = plans.make_operands(plan.expert_ids_NK.shape[0], dtype=jnp.bfloat16, width=192, hidden=136)
    run = jax.jit(
        functools.partial(value_and_gradients, run=functools.partial(routed_mlp, implementation=implementation))
    )
    y, (d_x, d_slots, _, *d_weights) = oracle_on_cpu(plan, operands)
    for a, b in zip(run(plan, operands), (y, d_x, d_slots, *d_weights), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=2e-2 * max(np.abs(b).max(), 1e-30))


def oracle_on_cpu(plan, operands):
    """The oracle needs float64, which a TPU lacks."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return plans.oracle_value_and_gradients(*jax.device_put((plan, operands), cpu))

"""The shared cases on a GPU or a TPU that is there, not interpreted: `pytest -m gpu`, `pytest -m tpu`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.ops._gpu import gpu_kind, is_hopper
from anyexperts_jax.ops.expert_mlp import expert_mlp
from tests.ops.expert_mlp.cases import COUNTS, check, expected, make_operands, run
from tests.ops.expert_mlp.gpu_cases import check as check_each_expert
from tests.ops.expert_mlp.gpu_cases import counts_cases

BLOCK = 128  # rows of the tiles that the GPU kernels choose
CAPACITY = 2 * BLOCK + 8
GPU_COUNTS = counts_cases(BLOCK, CAPACITY)


@functools.cache
def compiled(implementation):
    """One program for all counts of a shape."""
    return jax.jit(functools.partial(run, functools.partial(expert_mlp, implementation=implementation)))


@pytest.mark.gpu
@pytest.mark.parametrize("counts", GPU_COUNTS.values(), ids=GPU_COUNTS)
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("pallas_gpu", jnp.bfloat16), ("pallas_triton", jnp.bfloat16), ("pallas_triton", np.float32)],
)
@pytest.mark.parametrize(("width", "hidden"), [(192, 320), (200, 136)])
def test_gpu_kernels(implementation, dtype, counts, width, hidden):
    if implementation == "pallas_gpu" and not is_hopper(gpu_kind()):
        pytest.skip(f"needs a Hopper GPU; this is {gpu_kind()}")
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

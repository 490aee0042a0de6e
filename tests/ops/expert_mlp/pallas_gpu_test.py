"""The Mosaic GPU kernels in interpret mode: shared memory holds NaN before it is written, and races raise."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.ops.expert_mlp import pallas_gpu
from anyexperts_jax.ops.expert_mlp.vjp_gpu import Options, expert_mlp_mosaic
from tests.ops.expert_mlp.gpu_cases import check, counts_cases, expected, make_operands, run

# JAX 0.10 has the interpreter but not its public name, and stops where TMA reads zeros past an array's edge.
TMA_EDGES = jax.version.__version_info__ >= (0, 12)
PARAMS = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams

BLOCK = 128
CAPACITY = BLOCK + 8 if TMA_EDGES else 2 * BLOCK
COUNTS = counts_cases(BLOCK, CAPACITY)
SIZES = {"capacity": CAPACITY, "width": 72 if TMA_EDGES else 64, "hidden": 80 if TMA_EDGES else 64}
SMALL = pallas_gpu.Tiles(*(pallas_gpu.Tile(m=BLOCK, n=64, k=64, stages=2),) * 6)
OPTIONS = Options(tiles=SMALL, interpret=PARAMS(detect_races=True))


@functools.cache
def compiled(options=OPTIONS):
    """One program for all counts of a shape."""
    return jax.jit(functools.partial(run, functools.partial(expert_mlp_mosaic, options=options)))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_values_and_gradients(counts):
    operands = make_operands(counts, jnp.bfloat16, **SIZES)
    check(compiled()(operands), expected(operands), jnp.bfloat16)

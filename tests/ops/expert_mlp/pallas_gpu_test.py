"""The Mosaic GPU kernels in interpret mode: shared memory holds NaN before it is written, and races raise."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.ops.expert_mlp import expert_mlp, mosaic_bodies
from anyexperts_jax.ops.expert_mlp.gpu_passes import GpuOptions
from anyexperts_jax.ops.expert_mlp.gpu_tiles import MosaicTile, Tiles
from anyexperts_jax.ops.expert_mlp.vjp_gpu import expert_mlp_mosaic
from tests.ops.expert_mlp.cases import expected, make_operands, run
from tests.ops.expert_mlp.gpu_cases import check, counts_cases

# JAX 0.10's interpreter stops at what these kernels do, and its compiler has not been tried: they ask for 0.12.
NEW_JAX = jax.__version_info__ >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="the Mosaic GPU kernels need JAX 0.11")
PARAMS = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams

BLOCK = 128  # the smallest tile the kernels take
CAPACITY = BLOCK + 5
COUNTS = counts_cases(BLOCK, CAPACITY)
del COUNTS["every other empty"], COUNTS["all full"]  # they take seconds each, and the Triton tests cover them
SIZES = {"capacity": CAPACITY, "width": 60, "hidden": 50}  # padded to 64 by the wrapper
SMALL = Tiles(*(MosaicTile(m=BLOCK, n=64, k=64, stages=2),) * 6)
OPTIONS = GpuOptions(tiles=SMALL, interpret=PARAMS(detect_races=True))


@functools.cache
def compiled(options=OPTIONS):
    """One program for all counts of a shape."""
    return jax.jit(functools.partial(run, functools.partial(expert_mlp_mosaic, options=options)))


@needs_new_jax
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_values_and_gradients(counts):
    operands = make_operands(counts, jnp.bfloat16, **SIZES)
    check(compiled()(operands), expected(operands), jnp.bfloat16)


@pytest.mark.slow
@needs_new_jax
@pytest.mark.parametrize("residuals", ["saved", "recomputed"])
def test_widths_that_end_inside_a_tile(residuals):
    operands = make_operands((BLOCK + 2, 5), jnp.bfloat16, capacity=BLOCK + 8, width=192, hidden=192)
    tiles = Tiles(*(MosaicTile(m=BLOCK, n=128, k=64, stages=2),) * 6)
    results = compiled(dataclasses.replace(OPTIONS, tiles=tiles, residuals=residuals))(operands)
    check(results, expected(operands), jnp.bfloat16)


# No two sizes of a kernel's tile can be taken for each other, and the last tiles are cut.
UNEVEN = Tiles(
    gate_up=MosaicTile(m=128, n=64, k=192, stages=2),
    down=MosaicTile(m=256, n=128, k=64, stages=3),
    d_gate_up=MosaicTile(m=128, n=192, k=64, stages=2),
    d_x=MosaicTile(m=256, n=64, k=128, stages=1),
    d_w_gate_up=MosaicTile(m=128, n=192, k=64, stages=2),
    d_w_down=MosaicTile(m=256, n=64, k=128, stages=3),
)


@pytest.mark.slow
@needs_new_jax
def test_tiles_of_three_lengths_that_differ_in_every_kernel():
    operands = make_operands((5, BLOCK + 8), jnp.bfloat16, capacity=BLOCK + 8, width=320, hidden=256)
    check(compiled(dataclasses.replace(OPTIONS, tiles=UNEVEN))(operands), expected(operands), jnp.bfloat16)


@pytest.mark.slow
@needs_new_jax
@pytest.mark.parametrize(
    "fault",
    [
        lambda o: o._replace(w_gate_EDF=o.w_up_EDF, w_up_EDF=o.w_gate_EDF),
        lambda o: o._replace(counts_E=o.counts_E + 1),
        lambda o: o._replace(counts_E=jnp.maximum(o.counts_E - 1, 0)),
    ],
    ids=["gate and up swapped", "counts too high", "counts too low"],
)
def test_the_checks_catch(fault):
    operands = make_operands(COUNTS["first and last empty"], jnp.bfloat16, **SIZES)
    with pytest.raises(AssertionError):
        check(compiled()(fault(operands)), expected(operands), jnp.bfloat16)


@pytest.mark.slow
@needs_new_jax
def test_the_checks_catch_kernels_that_store_dead_rows(monkeypatch):
    store = mosaic_bodies._store
    monkeypatch.setattr(mosaic_bodies, "_store", lambda *args: store(*args[:-2], None, args[-1]))
    operands = make_operands((3,), jnp.bfloat16, capacity=BLOCK, width=64, hidden=64)
    broken = jax.jit(lambda o: run(functools.partial(expert_mlp_mosaic, options=OPTIONS), o))
    with pytest.raises(AssertionError):
        check(broken(operands), expected(operands), jnp.bfloat16)


@pytest.mark.skipif(NEW_JAX, reason="JAX is new enough")
def test_an_old_jax_is_refused():
    operands = make_operands((3,), jnp.bfloat16, **SIZES)[:-1]
    with pytest.raises(UserError, match=r"^implementation='pallas_gpu' needs JAX 0.11 and this is 0\.10\."):
        expert_mlp(*operands, implementation="pallas_gpu")


@needs_new_jax
def test_errors_say_why_and_what_to_do():
    operands = make_operands((3,), jnp.bfloat16, **SIZES)[:-1]
    message = "implementation='pallas_gpu' needs a Hopper GPU and this runs on cpu; use implementation='xla'"
    with pytest.raises(UserError, match=f"^{message}$"):
        expert_mlp(*operands, implementation="pallas_gpu")
    wide = make_operands((3,), np.float32, **SIZES)[:-1]
    message = "implementation='pallas_gpu' takes bfloat16 and x is float32; cast it or use implementation="
    with pytest.raises(UserError, match=f"^{message}'pallas_triton'$"):
        expert_mlp_mosaic(*wide, OPTIONS)

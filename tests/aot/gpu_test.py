"""GPU kernels compile for GPUs that are not attached and need no more resources than the committed table says.

The table is experiments/results/kernels_gpu.json, which `gpu_table_test` checks without a compiler; here every kernel
of it is compiled again. After a change that is meant to cost registers or shared memory,
experiments/bench/kernels_gpu.py writes the table anew.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.aot.gpu import compile_for, compile_kernel, complaints, missing_packages
from anyexperts_jax.aot.gpu_kernels import SHAPES, cases, triton_cases
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import gpus
from anyexperts_jax.dispatch.apply import moe_apply
from anyexperts_jax.ops.expert_mlp import pallas_triton
from anyexperts_jax.ops.expert_mlp.gpu_tiles import TritonTile
from tests.dispatch.plans import make_operands, make_plan, random_ids

TABLE = json.loads(
    (pathlib.Path(__file__).resolve().parents[2] / "experiments" / "results" / "kernels_gpu.json").read_text()
)["kernels"]
REGISTER_SLACK = 16  # what another version of the compiler may add
H100 = gpus()["h100"]
CASES = {name: (case, target) for name, case, target in cases()}

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(missing_packages()), reason=f"not installed: {', '.join(missing_packages())}"),
]


def check(report, golden, target):
    assert complaints(report, target) == []
    assert report.tma == golden["tma"]
    assert report.registers <= golden["registers"] + REGISTER_SLACK
    assert report.shared_bytes <= golden["shared_bytes"]


@pytest.mark.parametrize("name", CASES)
def test_takes_no_more_than_the_table_says(name):
    if "/pallas_gpu/" in name and jax.__version_info__ < (0, 11):
        pytest.skip("the Mosaic GPU kernels need JAX 0.11")
    case, target = CASES[name]
    check(compile_kernel(*case, target), TABLE[name], target)


def test_the_check_sees_a_tile_that_spills():
    _, operands = triton_cases(SHAPES["A"], "bfloat16", H100)["d_gate_up"]
    tile = TritonTile(m=128, n=128, k=64, warps=8, stages=4)
    report = compile_kernel(lambda *a: pallas_triton.d_gate_up(*a, tile=tile, interpret=False), operands, H100)
    assert report.spill_bytes > 0
    with pytest.raises(AssertionError):
        check(report, TABLE["H100/pallas_triton/A/bfloat16/d_gate_up"], H100)


def test_a_tile_that_does_not_fit_is_refused_by_the_compiler():
    _, operands = triton_cases(SHAPES["A"], "bfloat16", H100)["down"]
    tile = TritonTile(m=128, n=128, k=64, warps=8, stages=9)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"[Ss]hared memory"):
        compile_kernel(lambda *a: pallas_triton.down(*a, tile=tile, zeros=True, interpret=False), operands, H100)


def test_two_kernels_are_not_read_as_one():
    kernels = triton_cases(SHAPES["P"], "bfloat16", H100)
    (first, operands), (second, others) = kernels["down"], kernels["d_w_down"]
    with pytest.raises(UserError, match=r"^2 kernels with matmuls were compiled where one was expected$"):
        compile_kernel(lambda *a: (first(*a[:3]), second(*a[3:])), (*operands, *others), H100)


@pytest.mark.parametrize("implementation", ["pallas_triton", "pallas_gpu"])
@pytest.mark.parametrize("dispatch", ["blocks", "capacity"])
def test_a_whole_layer_compiles_forward_and_backward(implementation, dispatch):
    """Not only a kernel: applying a plan and its backward pass, as one program for an H100."""
    if implementation == "pallas_gpu" and jax.__version_info__ < (0, 11):
        pytest.skip("the Mosaic GPU kernels need JAX 0.11")
    plan = make_plan(random_ids(np.random.default_rng(0), 40, 3))

    how = {"dispatch": dispatch, "implementation": implementation}

    def layer(plan, x, *weights):
        y, pull = jax.vjp(lambda *a: moe_apply(a[0], plan, *a[1:], **how), x, *weights)
        return y, *pull(y)

    operands = make_operands(40, dtype=jnp.bfloat16, width=72, hidden=48)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (plan, *operands))
    program = compile_for(layer, abstract, H100)
    mosaic = program.as_text().count("mosaic_gpu")
    assert (mosaic > 0) == (implementation == "pallas_gpu")

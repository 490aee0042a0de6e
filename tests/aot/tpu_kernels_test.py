"""The TPU kernels, forward and backward, compiled for chips that are not attached."""

import jax
import pytest

from anyexperts_jax.aot import kernels, report, topology
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import tpus
from anyexperts_jax.ops.expert_mlp import expert_mlp
from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes, TpuSizes
from anyexperts_jax.ops.expert_mlp.vjp_tpu import TpuOptions, expert_mlp_pallas_tpu

NAMES = {"expert_mlp_forward", "expert_mlp_backward", "expert_mlp_backward_weights"}


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_the_papers_layer_fits_in_vmem(chip, schedules):
    reports = report.compile_report(chip, kernels.forward_backward, kernels.arguments(kernels.SHAPES["P"]), schedules)
    assert {one.name for one in reports} == NAMES
    for one in reports:
        assert one.vmem_bytes <= tpus()[chip].limits.vmem_bytes, one.name
        assert one.occupancy > 0.9, one.name


@pytest.mark.aot
@pytest.mark.parametrize("residuals", ["saved", "recomputed"])
@pytest.mark.parametrize("columns", [None, 128])
@pytest.mark.parametrize(("chip", "dtype"), [("v5e", "float32"), ("v5p", "bfloat16"), ("v6e", "float32")])
def test_every_form_compiles(chip, dtype, columns, residuals, schedules):
    """Whole or partial weights, float32, gate and up recomputed, rows that are not a multiple of a block."""
    rows = KernelSizes(128, 128, 64, columns)
    weights = KernelSizes(128, 128, 64, 128)
    options = TpuOptions(
        residuals, TpuSizes(rows, rows, weights, tpus()[chip].limits.cores, tpus()[chip].limits.vmem_bytes)
    )

    def forward_backward(x, counts, w_gate, w_up, w_down, d_y):
        def op(x, *weights):
            return expert_mlp_pallas_tpu(x, counts, *weights, options=options)

        y, pull = jax.vjp(op, x, w_gate, w_up, w_down)
        return y, *pull(d_y)

    shape = kernels.ExpertShape(experts=3, width=256, hidden=384, rows=384)
    assert shape.capacity % rows.block
    found = report.compile_report(chip, forward_backward, kernels.arguments(shape, dtype), schedules)
    assert len([r for r in found if r.name.startswith("expert_mlp")]) == (3 if columns is None else 5)


@pytest.mark.aot
def test_a_tpu_mesh_picks_the_kernels_and_a_cpu_does_not(schedules):
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in kernels.arguments(kernels.SHAPES["P"])]
    assert "pallas_call" not in str(jax.make_jaxpr(expert_mlp)(*arguments[:5]))
    with topology.mesh_of("v5e"):
        assert "pallas_call" in str(jax.make_jaxpr(expert_mlp)(*arguments[:5]))
        halves = [a if a.dtype == "int32" else jax.ShapeDtypeStruct(a.shape, "float16") for a in arguments]
        assert "pallas_call" not in str(jax.make_jaxpr(expert_mlp)(*halves[:5]))


@pytest.mark.aot
def test_the_compiler_writes_to_one_directory_a_process(schedules, tmp_path):
    topology.open_compiler(schedules)
    with pytest.raises(UserError, match=r"names another directory than .*; start a new process$"):
        topology.open_compiler(tmp_path)

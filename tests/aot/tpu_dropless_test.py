"""`routed_mlp` by the TPU kernels, forward and backward, compiled for chips that are not attached."""

import jax
import jax.numpy as jnp
import pytest

from anyexperts_jax.aot import report, topology
from anyexperts_jax.core.hardware import tpus
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import routed_mlp
from anyexperts_jax.ops.slot_order import SlotOrder

NAMES = {"expert_mlp_forward", "expert_mlp_backward", "expert_mlp_backward_weights"}
SHAPES = {"small": (8, 256, 128, 64, 4), "P": (256, 2048, 512, 8192, 12)}  # E, D, F, N, K


def arguments(experts, width, hidden, tokens, slots):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    places, of_expert = array(tokens, slots, dtype=jnp.int32), array(experts, dtype=jnp.int32)
    order = [array(tokens * slots, dtype=jnp.int32), places, of_expert, of_expert]
    weights = [array(experts, width, hidden), array(experts, width, hidden), array(experts, hidden, width)]
    wide = {"dtype": jnp.float32}
    return [array(tokens, width), array(tokens, slots, **wide), *order, *weights, array(tokens, width, **wide)]


def forward_backward(x, slot_weights, slots, places, starts, counts, w_gate, w_up, w_down, d_y):
    order = SlotOrder(slots, places, starts, counts)
    y, pull = jax.vjp(
        lambda x, s, *w: routed_mlp(x, s, order, ExpertWeights(*w)), x, slot_weights, w_gate, w_up, w_down
    )
    return y, *pull(d_y)


@pytest.mark.aot
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_compiles_and_fits(chip, shape, schedules):
    """Uses the default implementation of a TPU mesh, and so also tests that these kernels are the default."""
    reports = report.compile_report(chip, forward_backward, arguments(*SHAPES[shape]), schedules)
    assert {one.name for one in reports if one.name.startswith("expert_mlp")} == NAMES
    for one in reports:
        assert one.vmem_bytes <= tpus()[chip].limits.vmem_bytes, one.name
        if (chip, shape) == ("v5e", "P"):
            assert one.occupancy > 0.9, one.name


@pytest.mark.aot
def test_a_tpu_mesh_picks_the_kernels_and_a_cpu_does_not(schedules):
    operands = arguments(*SHAPES["small"])
    assert "pallas_call" not in str(jax.make_jaxpr(forward_backward)(*operands))
    with topology.mesh_of("v5e"):
        assert "pallas_call" in str(jax.make_jaxpr(forward_backward)(*operands))

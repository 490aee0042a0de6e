"""`routed_mlp` on the experts of one layer among those of all layers, kernels in interpret mode.

Other layers hold NaN, so a value read from one of them is seen.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.expert_ops.gpu import PALLAS_GPU, PALLAS_TRITON
from anyexperts_jax.ops.expert_ops.plain import REFERENCE, XLA
from anyexperts_jax.ops.expert_ops.tpu import PALLAS_TPU
from anyexperts_jax.ops.experts import ExpertWeights, StackedExperts
from anyexperts_jax.ops.routed_mlp import gpu, tpu, xla
from tests.dispatch import plans
from tests.ops.expert_mlp import pallas_gpu_test as mosaic
from tests.ops.expert_mlp import pallas_triton_test as triton
from tests.ops.routed_mlp.interpret import check_races, options

LAYERS, LAYER = 3, 1
TPU = options(block=16)
MOSAIC = {"width": 64, "hidden": 128, "dtype": jnp.bfloat16}
# (in place, on the layer's own experts, sizes)
OPS = {
    "xla": (
        xla.forward_of_few_rows,
        xla.forward_of_few_rows,
        {"width": 6, "hidden": 7},
    ),
    "triton": (
        functools.partial(gpu.triton_in_place, options=triton.OPTIONS),
        functools.partial(gpu.routed_mlp_triton, options=triton.OPTIONS),
        {"width": 20, "hidden": 24},
    ),
    "mosaic": (
        functools.partial(gpu.mosaic_in_place, options=mosaic.OPTIONS),
        functools.partial(gpu.routed_mlp_mosaic, options=mosaic.OPTIONS),
        MOSAIC,
    ),
    "tpu": (
        functools.partial(tpu.routed_mlp_in_place, options=TPU),
        functools.partial(tpu.routed_mlp_pallas_tpu, options=TPU),
        {"width": 128, "hidden": 128},
    ),
    "tpu, two kernels": (
        functools.partial(tpu.routed_mlp_in_place, options=options(block=16, columns=128)),
        functools.partial(tpu.routed_mlp_pallas_tpu, options=options(block=16, columns=128)),
        {"width": 128, "hidden": 256},
    ),
}


def stacked(weights):
    """The experts among those of other layers, all of them NaN."""
    return ExpertWeights(*(jnp.concatenate([jnp.full_like(w, np.nan), w, jnp.full_like(w, np.nan)]) for w in weights))


RANDOM = [pytest.param(op, "random", marks=mosaic.needs_new_jax if op == "mosaic" else ()) for op in OPS]


@pytest.mark.parametrize(("op", "name"), [*RANDOM, ("triton", "all slots virtual"), ("tpu", "all slots virtual")])
def test_changes_no_bit(op, name):
    in_place, whole, sizes = OPS[op]
    plan = plans.PLANS[name]
    x_ND, *weights = plans.make_operands(plan.expert_ids_NK.shape[0], **sizes)
    order = sort_slots(plan.expert_ids_NK, plans.EXPERTS)
    experts = StackedExperts(stacked(weights), jnp.int32(LAYER * plans.EXPERTS))
    found = jax.jit(in_place)(x_ND, plan.weights_NK, order, experts)
    if op.startswith("tpu"):
        check_races()
    wanted = jax.jit(whole)(x_ND, plan.weights_NK, order, ExpertWeights(*weights))
    np.testing.assert_array_equal(found, wanted)
    assert np.abs(found).max() > 0 or name != "random"


def test_a_wrong_layer_is_found():
    in_place, _, sizes = OPS["triton"]
    plan = plans.PLANS["random"]
    x_ND, *weights = plans.make_operands(plan.expert_ids_NK.shape[0], **sizes)
    order = sort_slots(plan.expert_ids_NK, plans.EXPERTS)
    assert np.isnan(in_place(x_ND, plan.weights_NK, order, StackedExperts(stacked(weights), jnp.int32(0)))).any()


F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


@pytest.mark.parametrize(
    ("ops", "slots", "shape", "dtype", "expected"),
    [
        (XLA, 10, (15, 6, 7), F32, True),
        (XLA, 11, (15, 6, 7), F32, False),  # more than two slots an expert: a loop over the experts is faster
        (XLA, 10, (15, 6, 7), BF16, True),  # a row is converted when it is read
        (PALLAS_TRITON, 1000, (15, 6, 7), F32, True),
        (PALLAS_TRITON, 10, (15, 6, 7), BF16, False),  # converting would copy all layers
        (PALLAS_GPU, 1000, (15, 64, 128), F32, True),
        (PALLAS_GPU, 10, (15, 64, 96), F32, False),  # and so would padding
        (PALLAS_TPU, 1000, (15, 128, 256), F32, True),
        (PALLAS_TPU, 10, (15, 64, 256), F32, False),
    ],
)
def test_only_weights_that_are_taken_as_they_are_stored(ops, slots, shape, dtype, expected):
    weights = ExpertWeights(*(jax.ShapeDtypeStruct(shape, F32),) * 3)
    assert ops.in_place.pays(slots, plans.EXPERTS, weights, dtype) == expected
    assert REFERENCE.in_place is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 128, "hidden": 64}, "D=128 and F=64 must be multiples of 128"),
        ({"width": 128, "hidden": 128, "dtype": jnp.bfloat16}, "w_gate_EDF is bfloat16 and x is float32"),
    ],
)
def test_weights_that_would_be_copied_are_refused(sizes, message):
    plan = plans.PLANS["random"]
    x_ND, *weights = plans.make_operands(plan.expert_ids_NK.shape[0], **sizes)
    order = sort_slots(plan.expert_ids_NK, plans.EXPERTS)
    experts = StackedExperts(stacked(weights), jnp.int32(0))
    with pytest.raises(UserError, match=message):
        tpu.routed_mlp_in_place(x_ND.astype(F32), plan.weights_NK, order, experts, options=TPU)

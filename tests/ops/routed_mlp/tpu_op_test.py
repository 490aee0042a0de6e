"""`routed_mlp` by the TPU kernels in interpret mode, values and every gradient; sizes; refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import tpus
from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.expert_mlp.tpu_sizes import Shape
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import routed_mlp, tpu
from tests.dispatch import plans
from tests.ops.routed_mlp.interpret import check_races, options
from tests.ops.routed_mlp.routed_cases import value_and_gradients

SHORT = options(block=16)


@pytest.mark.parametrize(("name", "columns"), [("random", None), ("random", 128), ("all slots virtual", None)])
def test_routed_mlp(name, columns):
    """Widths that are no multiple of a tile, against the oracle in float64."""
    plan = plans.make_plan(plans.PLANS[name].expert_ids_NK, virtual_output="zero")
    operands = plans.make_operands(plan.expert_ids_NK.shape[0])
    chosen = SHORT if columns is None else options(block=16, columns=columns)
    run = jax.jit(
        functools.partial(value_and_gradients, run=functools.partial(tpu.routed_mlp_pallas_tpu, options=chosen))
    )
    found = jax.block_until_ready(run(plan, operands))
    check_races()
    y, (d_x, d_slots, _, *d_weights) = plans.oracle_value_and_gradients(plan, operands)
    for a, b in zip(found, (y, d_x, d_slots, *d_weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    assert found[0].dtype == jnp.float32


@pytest.mark.slow
def test_a_slot_of_weight_zero_has_its_gradient_and_a_wrong_weight_is_found():
    plan = plans.make_plan(plans.PLANS["random"].expert_ids_NK, virtual_output="zero")
    slot = np.argwhere(np.asarray(plan.expert_ids_NK) < plans.EXPERTS)[0]
    plan = dataclasses.replace(plan, weights_NK=plan.weights_NK.at[tuple(slot)].set(0))
    operands = plans.make_operands(plan.expert_ids_NK.shape[0])
    run = jax.jit(
        functools.partial(value_and_gradients, run=functools.partial(tpu.routed_mlp_pallas_tpu, options=SHORT))
    )
    _, (_, wanted, *_) = plans.oracle_value_and_gradients(plan, operands)
    assert abs(wanted[tuple(slot)]) > 0.01
    np.testing.assert_allclose(run(plan, operands)[2], wanted, rtol=1e-4, atol=2e-5)
    wrong = dataclasses.replace(plan, weights_NK=plan.weights_NK.at[tuple(slot)].set(1))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(run(wrong, operands)[2], wanted, rtol=1e-4, atol=2e-5)


# Sizes and refusals.


@pytest.mark.parametrize("chip", tpus())
@pytest.mark.parametrize("slots", [1, 40, 128, 384, 1000, 10**5])
def test_any_load_has_sizes_whose_blocks_fit_each_other(chip, slots):
    for width, hidden, itemsize in ((2048, 512, 2), (2048, 1408, 2), (4096, 14336, 2), (1024, 640, 4)):
        sizes = tpu.aligned_sizes(tpus()[chip].limits, Shape(slots, width, hidden, itemsize))
        assert tpu.buffer_block(sizes) == max(sizes.forward.block, sizes.backward.block, sizes.weights.block)
        assert 16 <= tpu.buffer_block(sizes) <= max(16, slots / 2)


def test_kernels_that_cannot_run_here_are_refused():
    plan = plans.PLANS["random"]
    x, *weights = plans.make_operands(12)
    order = sort_slots(plan.expert_ids_NK, plan.spec.num_experts)
    message = r"^implementation='pallas_tpu' needs a TPU and the platform is 'cpu'; use implementation='xla'$"
    with pytest.raises(UserError, match=message):
        routed_mlp(x, plan.weights_NK, order, ExpertWeights(*weights), implementation="pallas_tpu")

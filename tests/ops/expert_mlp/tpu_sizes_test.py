import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import tpu_limits, tpus
from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes, Shape, choose_sizes

CHIPS = {name: tpu.limits for name, tpu in tpus().items()}
UNKNOWN_CHIP = tpu_limits(None)
SHAPES = {"A": Shape(960, 2048, 1408, 2), "B": Shape(320, 2048, 768, 2), "P": Shape(320, 2048, 512, 2)}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_studied_shapes_run_fused(chip, shape):
    sizes = choose_sizes(CHIPS[chip], SHAPES[shape])
    assert sizes.forward.columns is None
    assert sizes.forward.block >= 128


def test_both_cores_of_a_v5p_take_part_in_every_kernel():
    sizes = choose_sizes(CHIPS["v5p"], SHAPES["P"])
    assert sizes.cores == 2
    assert sizes.weights.columns <= SHAPES["P"].hidden // 2


def test_large_experts_and_unknown_chips_keep_a_part_of_the_columns():
    for chip, shape in ((CHIPS["v6e"], Shape(1024, 4096, 14336, 2)), (UNKNOWN_CHIP, SHAPES["A"])):
        sizes = choose_sizes(chip, shape)
        assert sizes.forward.columns is not None
        assert sizes.backward.columns is not None


@pytest.mark.parametrize("capacity", [16, 48, 128, 144, 320, 960, 5000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_any_capacity_has_sizes(capacity, itemsize):
    for chip in (*CHIPS.values(), UNKNOWN_CHIP):
        sizes = choose_sizes(chip, Shape(capacity, 1024, 640, itemsize))
        assert sizes.forward.block < capacity + sizes.forward.step


def test_sizes_that_cannot_fit_or_are_invalid_are_refused():
    with pytest.raises(UserError, match=r"^forward: D=1048576, F=128 at 4 bytes needs \d+ bytes of VMEM and \d+ are"):
        choose_sizes(CHIPS["v5e"], Shape(128, 2**20, 128, 4))
    with pytest.raises(UserError, match=r"^slab=256 is more than block=128$"):
        KernelSizes(128, 256, 128)
    with pytest.raises(UserError, match=r"^block=130 and slab=128 must be multiples of step=128, that one of 8$"):
        KernelSizes(130, 128, 128)
    with pytest.raises(UserError, match=r"^inner=192 must be a multiple of 128$"):
        KernelSizes(128, 128, 128, inner=192)

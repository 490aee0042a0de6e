import pytest

from anyexperts_jax.aot.chips import GPUS, chip_peaks
from anyexperts_jax.aot.topology import TOPOLOGIES
from anyexperts_jax.core.errors import UserError


@pytest.mark.parametrize("name", [*TOPOLOGIES, *GPUS])
def test_every_chip_that_can_be_compiled_for_has_its_peaks(name):
    chip = chip_peaks(name)
    assert 1e14 < chip.flops < 2e15
    assert chip.hbm == round(chip.hbm_gib * 2**30)
    assert chip.is_gpu == (name in GPUS)
    # Between two neighbours travels less than to and from memory, between slices less still.
    assert chip.dcn_gbs < chip.link_gbs < chip.hbm_gbs


def test_an_unknown_chip_is_refused_with_the_known():
    with pytest.raises(UserError, match="chip='v3' is unknown; valid: v5e, v5p, v6e, tpu7x, h100"):
        chip_peaks("v3")

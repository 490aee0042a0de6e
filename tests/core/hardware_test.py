"""The table of chips: every entry is complete, and device kinds find their entry."""

import re

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import Gpu, Tpu, chip, gpu_limits, gpus, tpu_limits, tpus


@pytest.mark.parametrize("name", [*tpus(), *gpus()])
def test_a_chip_has_plausible_figures(name):
    one = chip(name)
    assert 1e14 < one.flops < 2e15
    assert one.hbm == round(one.hbm_gib * 2**30)
    assert one.is_gpu == (name in gpus()) == isinstance(one, Gpu) == (not isinstance(one, Tpu))
    # The link between neighbours is slower than memory, and the network between slices is slower still.
    assert one.dcn_gbs < one.link_gbs < one.hbm_gbs


@pytest.mark.parametrize("name", tpus())
def test_a_tpus_peak_is_a_whole_number_of_matrix_units_at_its_clock(name):
    """The one relation between two figures of the table: a unit of side 128 or 256 does 2 side^2 FLOP per cycle."""
    one = tpus()[name]
    units = one.flops / (2 * one.clock_ghz * 1e9)
    assert any(abs(units / side**2 - round(units / side**2)) < 0.01 for side in (128, 256))


def test_an_unknown_chip_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="chip='v3' is unknown; valid: v5e, v5p, v6e, tpu7x, h100"):
        chip("v3")


def test_device_kinds_of_tpus_as_jax_names_them():
    assert tpu_limits("TPU v5 lite") == tpus()["v5e"].limits
    assert tpu_limits("TPU v5") == tpus()["v5p"].limits
    assert tpu_limits("TPU7x") == tpus()["tpu7x"].limits
    for kind in ("TPU v9", "TPU v5 lite 2", "cpu", None):
        limits = tpu_limits(kind)
        assert (limits.name, limits.cores) == ("", 1)
        assert all(limits.vmem_bytes < tpu.limits.vmem_bytes for tpu in tpus().values())


def test_device_kinds_of_gpus_as_jax_names_them():
    assert gpu_limits("NVIDIA H100 80GB HBM3").compute_capability == "9.0"
    assert gpu_limits("NVIDIA GH200 480GB") == gpus()["h100"].limits
    assert gpu_limits("NVIDIA A100-SXM4-80GB").compute_capability == "8.0"
    unknown = gpu_limits(None)
    for kind in ("NVIDIA RTX A1000", "NVIDIA B200", "Tesla T4"):
        assert gpu_limits(kind) == unknown
    assert all(unknown.shared_bytes < gpu.limits.shared_bytes for gpu in gpus().values())


@pytest.mark.parametrize("name", gpus())
def test_the_card_compiled_for_is_one_of_the_chips_own(name):
    one = gpus()[name]
    assert one.has_kind(one.device)
    assert re.fullmatch(r"[a-z0-9]+\.txtpb", one.target)

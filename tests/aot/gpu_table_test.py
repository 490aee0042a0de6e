"""The committed table of GPU kernels, checked without a compiler: every kernel is listed and fits its GPU."""

import json
import pathlib

import pytest

from anyexperts_jax.aot import gpu
from anyexperts_jax.aot.gpu import KernelReport, complaints
from anyexperts_jax.aot.gpu_kernels import cases
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.hardware import gpus

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "results"
TABLE = {
    name: KernelReport(**row) for name, row in json.loads((RESULTS / "kernels_gpu.json").read_text())["kernels"].items()
}


def test_the_table_holds_every_kernel():
    assert list(TABLE) == [name for name, _, _ in cases()]


def test_every_kernel_fits_spills_nothing_and_is_on_the_tensor_cores_of_its_gpu():
    for name, row in TABLE.items():
        assert complaints(row, gpus()[name.split("/")[0].lower()]) == [], name


def test_mosaic_kernels_copy_by_tma():
    assert {name.split("/")[1] for name, row in TABLE.items() if row.tma} == {"pallas_gpu"}
    assert all(row.tma for name, row in TABLE.items() if "/pallas_gpu/" in name)


def test_the_page_shows_the_table():
    page = (RESULTS / "kernels_gpu.md").read_text()
    for name, row in TABLE.items():
        assert f"| {name} | {row.registers} | {row.spill_bytes} | {row.shared_bytes / 1024:.1f} |" in page


A100, H100 = gpus()["a100"], gpus()["h100"]


def test_a_plugin_that_does_not_load_is_one_line(monkeypatch):
    def not_registered(**options):
        raise NotImplementedError(f"topology not implemented for {options['platform']}")

    monkeypatch.setattr(gpu, "missing_packages", list)
    monkeypatch.setattr(gpu.topologies, "get_topology_desc", not_registered)
    with pytest.raises(UserError, match=r"^JAX's plugin for GPUs did not load \(.*for cuda\); compile with JAX_PLATF"):
        gpu.gpu_devices(gpus()["a100"], 1, 1, 3)


GOOD = KernelReport("k", 384, 168, 0, 227 * 1024, "wgmma", True)


@pytest.mark.parametrize(
    ("changed", "target", "found"),
    [
        ({"spill_bytes": 8}, H100, "spills 8 bytes"),
        ({"tensor_cores": ""}, H100, "multiplies with , not wgmma"),
        ({"shared_bytes": 227 * 1024 + 1}, H100, "232449 bytes of shared memory, 232448 are there"),
        ({"registers": 176}, H100, "384 threads of 176 registers, 65536 are there"),
        ({"shared_bytes": 163 * 1024}, A100, "multiplies with wgmma, not mma.sync"),
    ],
)
def test_each_excess_is_reported(changed, target, found):
    assert complaints(GOOD, H100) == []
    assert complaints(GOOD._replace(**changed), target) == [found]

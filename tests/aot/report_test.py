"""The parser of schedules, on an artificial one: 20 bundles, with a loop of 12 that may skip two passes."""

import pytest

from anyexperts_jax.aot import libtpu, report, topology
from anyexperts_jax.core.errors import UserError

UNITS = "== CAPACITY:\na head\n 2 1 1 1 1 1 1 1 1 1 1\n== UTILIZATION:\n"
# The loop is [4, 19). Branches at 5 and 10 go on after four more bundles: they skip [10, 12) and [15, 18).
BRANCHES = {5: 12, 10: 18, 14: 4}
MATMULS = {10: 2, 11: 1, 15: 2, 16: 2, 17: 2}


def write(directory, name="1700-jvp_a_kernel_.3", vmem="size = 0x100, offset = 0x80"):
    rows = [[MATMULS.get(i, 0), *[0] * 6, 3 if i == 6 else 0, 0, 5 if i == 7 else 0, 0] for i in range(20)]
    table = "".join(" ".join(map(str, row)) + "\n" for row in rows)
    (directory / f"{name}-68-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(UNITS + table)
    lines = [
        f" {i:#x} : > {{ sbr.rel (%p1) target bundleno = {BRANCHES[i]} }}" if i in BRANCHES else f" {i:#x} : > {{ }}"
        for i in range(20)
    ]
    (directory / f"{name}-65-packed-bundles-post-ra.txt").write_text("\n".join(lines).replace("0x0", "0", 1))
    (directory / f"{name}-64-schedule-analysis_packed-bundles-post-ra.txt").write_text("another file")
    allocation = (
        f"#allocation1 [shape = 'u8[256]', space=vmem, {vmem}]\n#allocation2 [space=smem, size = 0xffff, offset = 0]"
    )
    (directory / f"{name}-66-post-bundle-packing-post-ra.txt").write_text(allocation)


def test_passes_shared_cycles_spills_and_memory_are_parsed(tmp_path):
    write(tmp_path)
    (found,) = report.read_reports(tmp_path)
    assert found.name == "a_kernel"
    assert [(p.cycles, p.matmul_cycles, p.occupancy) for p in found.passes] == [(2, 1.5, 0.75), (3, 3.0, 1.0)]
    assert (found.cycles, found.step_cycles, found.skipped_cycles) == (20, 15, 0)
    assert (found.spills, found.fills, found.vmem_bytes, found.occupancy) == (5, 3, 0x180, 1.0)
    assert found.summary()["passes"][0] == {"cycles": 2, "occupancy": 0.75}


def test_a_schedule_without_its_companion_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "1700-jvp_a_kernel_.3-65-packed-bundles-post-ra.txt").unlink()
    with pytest.raises(UserError, match=r"holds 0 files 1700-jvp_a_kernel_\.3-\*-packed-bundles-post-ra\.txt"):
        report.read_reports(tmp_path)


def test_an_unknown_chip_is_refused():
    with pytest.raises(UserError, match=r"^chip='v9' is unknown; valid: v5e, v5p, v6e, tpu7x$"):
        topology.devices("v9")


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(libtpu, "has_libtpu", lambda: False)
    said = r"^libtpu is not installed; in a checkout, pip install -e '\.\[aot\]' \(Linux only\)$"
    with pytest.raises(UserError, match=said):
        topology.open_compiler(tmp_path)
    with pytest.raises(UserError, match=said):
        topology.slice_devices("v5e:2x4")

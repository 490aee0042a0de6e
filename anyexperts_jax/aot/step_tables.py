"""The figures of a compiled step as tables and as JSON. All are static: nothing was run."""

import dataclasses
from typing import Any

from anyexperts_jax.aot.decode import CompiledDecode
from anyexperts_jax.aot.step import CompiledStep
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.core.versions import versions


def step_tables(step: CompiledStep) -> list[TextTable]:
    """Tables of a device's memory, the collectives, the FLOPs, and the bounds that follow."""
    slices = f"{step.slices} slices of {step.topology}" if step.slices > 1 else step.topology
    title = (
        f"{step.parameters / 1e6:,.1f}M parameters on {slices}, {step.devices} devices: {mesh_text(step.mesh)}; "
        f"compiled in {step.seconds:.0f} s. Memory of a device"
    )
    return [_memory_table(step, title), _collectives_table(step), _work_table(step), _bounds_table(step)]


def decode_tables(step: CompiledDecode) -> list[TextTable]:
    """Tables of a device's memory, the collectives and the bounds of a step of decoding."""
    title = (
        f"A token for each of {step.rows} rows, a cache of {step.length} positions: {step.parameters / 1e6:,.1f}M "
        f"parameters on {step.topology}, {step.devices} devices: {mesh_text(step.mesh)}; compiled in "
        f"{step.seconds:.0f} s. Memory of a device"
    )
    return [_memory_table(step, title), _collectives_table(step), _bounds_table(step)]


def mesh_text(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def to_json(step: CompiledStep | CompiledDecode) -> dict[str, Any]:
    return {**dataclasses.asdict(step), "free": step.free, "bound": step.bounds.step, "versions": versions()}


def _memory_table(step: CompiledStep | CompiledDecode, title: str) -> TextTable:
    rows = [(what, _gib(size), f"{size / step.hbm:.1%}") for what, size in step.memory.items()]
    rows += [("free", _gib(step.free * step.hbm), f"{step.free:.1%}"), ("all", _gib(step.hbm), "100.0%")]
    return TextTable(title, ("what", "GiB", "share"), tuple(rows))


def _collectives_table(step: CompiledStep | CompiledDecode) -> TextTable:
    sent = [
        (row.kind, " x ".join(row.axes) or "no mesh axes", f"{row.count}", f"{row.bytes / 2**20:.1f}", _ms(seconds))
        for row, seconds in zip(step.collectives, step.bounds.collectives, strict=True)
    ]
    return TextTable(
        "Collectives of a step, loops multiplied out (MiB: of a device, the larger of in and out; ms: on its own)",
        ("kind", "over", "runs", "MiB", "at least, ms"),
        tuple(sent),
        names=2,
    )


def _work_table(step: CompiledStep) -> TextTable:
    work = step.work
    rows = [
        (name, f"{flops / 1e12:,.1f}", f"{flops / work.flops:.1%}")
        for name, flops in (*work.real_flops.items(), *work.extra_flops.items())
    ]
    title = (
        f"Matmuls of a step at the nominal budget, all devices. Expert rows: {work.rows_real / 1e6:,.2f}M real, "
        f"{work.rows_computed / 1e6:,.2f}M with tiles filled up, {work.rows_buffers / 1e6:,.2f}M in buffers"
        + (f"; {work.rows_sent / 1e6:,.2f}M rows sent" if work.rows_sent else "")
    )
    return TextTable(title, ("what", "TFLOP", "share"), (*rows, ("all", f"{work.flops / 1e12:,.1f}", "100.0%")))


def _bounds_table(step: CompiledStep | CompiledDecode) -> TextTable:
    bounds = step.bounds
    found = {
        "arithmetic": bounds.arithmetic,
        "memory bandwidth": bounds.hbm,
        "network in a slice": bounds.network,
        "network between slices": bounds.between_slices,
    }
    title = f"Bounds on a step, none of them a time measured; the largest leaves an MFU of {bounds.mfu:.1%} at most"
    rows = [(name, _ms(value)) for name, value in found.items() if value or name != "network between slices"]
    return TextTable(title, ("what", "at least, ms"), tuple(rows))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"

"""The figures of a compiled step as tables and as JSON. All are static: nothing was run."""

import dataclasses
from typing import Any

from anyexperts_jax.aot.decode import CompiledDecode
from anyexperts_jax.aot.step import CompiledStep
from anyexperts_jax.core.quantities import bytes_text, count_text, flops_text
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.core.versions import versions


def step_tables(step: CompiledStep) -> list[TextTable]:
    """Tables of a device's memory, the collectives, the FLOPs, and the bounds that follow."""
    slices = f"{step.slices} slices of {step.topology}" if step.slices > 1 else step.topology
    title = (
        f"{count_text(step.parameters)} parameters on {slices}, {step.devices} devices: {mesh_text(step.mesh)}; "
        f"compiled in {step.seconds:.0f} s. Memory of a device"
    )
    return [_memory_table(step, title), _collectives_table(step), _work_table(step), _bounds_table(step)]


def decode_tables(step: CompiledDecode) -> list[TextTable]:
    """Tables of a device's memory, the collectives and the bounds of a step of decoding."""
    title = (
        f"A token for each of {step.rows} rows, a cache of {step.length} positions: "
        f"{count_text(step.parameters)} parameters on {step.topology}, {step.devices} devices: {mesh_text(step.mesh)}; "
        f"compiled in {step.seconds:.0f} s. Memory of a device"
    )
    return [_memory_table(step, title), _collectives_table(step), _bounds_table(step)]


def mesh_text(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def to_json(step: CompiledStep | CompiledDecode) -> dict[str, Any]:
    return {**dataclasses.asdict(step), "free": step.free, "bound": step.bounds.step, "versions": versions()}


def _memory_table(step: CompiledStep | CompiledDecode, title: str) -> TextTable:
    sizes = {**step.memory, "free": step.free * step.hbm, "all": step.hbm}
    rows = [(what, bytes_text(size, 2), f"{size / step.hbm:.1%}") for what, size in sizes.items()]
    return TextTable(title, ("what", "size", "share"), tuple(rows))


def _collectives_table(step: CompiledStep | CompiledDecode) -> TextTable:
    sent = [
        (row.kind, " x ".join(row.axes) or "no mesh axes", f"{row.count}", bytes_text(row.bytes), _ms(seconds))
        for row, seconds in zip(step.collectives, step.bounds.collectives, strict=True)
    ]
    return TextTable(
        "Collectives of a step, loops multiplied out (size: of a device, the larger of in and out; ms: on its own)",
        ("kind", "over", "runs", "size", "at least, ms"),
        tuple(sent),
        names=2,
    )


def _work_table(step: CompiledStep) -> TextTable:
    work = step.work
    rows = [
        (name, flops_text(flops), f"{flops / work.flops:.1%}")
        for name, flops in (*work.real_flops.items(), *work.extra_flops.items())
    ]
    title = (
        f"Matmuls of a step at the nominal budget, all devices. Expert rows: {count_text(work.rows_real)} real, "
        f"{count_text(work.rows_computed)} with tiles filled up, {count_text(work.rows_buffers)} in buffers"
        + (f"; {count_text(work.rows_sent)} rows sent" if work.rows_sent else "")
    )
    return TextTable(title, ("what", "operations", "share"), (*rows, ("all", flops_text(work.flops), "100.0%")))


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


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.2f}" if milliseconds >= 1 else f"{milliseconds:.2g}"

"""A compiled step's figures as tables and as JSON. All are static: read from the compiler, nothing was run."""

import dataclasses
from typing import Any

from anyexperts_jax.analysis.tables import TextTable
from anyexperts_jax.analysis.versions import versions
from anyexperts_jax.aot.step import CompiledStep


def step_tables(step: CompiledStep) -> list[TextTable]:
    """What a device's memory holds, and what devices send each other."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in step.mesh.items() if size > 1) or "one device"
    memory = [(what, _gib(size), f"{size / step.hbm:.1%}") for what, size in step.memory.items()]
    memory += [("free", _gib(step.free * step.hbm), f"{step.free:.1%}"), ("all", _gib(step.hbm), "100.0%")]
    sent = [
        (row.kind, " x ".join(row.axes) or "no mesh axes", f"{row.count}", f"{row.bytes / 2**20:.1f}")
        for row in step.collectives
    ]
    title = (
        f"{step.parameters / 1e6:,.1f}M parameters on {step.topology}, {step.devices} devices: {mesh}; "
        f"compiled in {step.seconds:.0f} s. Memory of a device"
    )
    return [
        TextTable(title, ("what", "GiB", "share"), tuple(memory)),
        TextTable(
            "Collectives of a step, loops multiplied out (MiB: of a device, the larger of in and out)",
            ("kind", "over", "runs", "MiB"),
            tuple(sent),
        ),
    ]


def to_json(step: CompiledStep) -> dict[str, Any]:
    return {**dataclasses.asdict(step), "free": step.free, "versions": versions()}


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"

"""Reads libtpu's schedules of each kernel. All figures are static: they come from the compiler and are not measured.

A schedule is a list of bundles, one per cycle unless the core waits for a copy. Backward branches mark loops, forward
branches mark code that a step may skip. The passes of a kernel over a tile's rows are such code, each with its own
matmuls; so a step takes the cycles of its pass plus those that all steps share.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from anyexperts_jax.aot.topology import compile_for
from anyexperts_jax.core.errors import require

_UTILISATION = "-pre-delay_hlo-static-per-bundle-utilization.txt"  # before empty bundles are folded into delays
_SCHEDULE = "-packed-bundles-post-ra.txt"
_ALLOCATIONS = "-post-bundle-packing-post-ra.txt"
_MATMUL, _SPILL, _FILL = 0, 9, 7  # columns of the utilisation table
_DELAY_SLOTS = 4  # bundles after a branch that always run, whether it is taken or not
_BRANCH = re.compile(r"sbr\.rel(?:\.\w+)? *(?:\([^)]*\))? *target bundleno = (\d+)")
_NUMBER = re.compile(r"^ *(0x[0-9a-f]+|0) ")
_VMEM = re.compile(
    r"#allocation\d+(?:_spill)? \[[^\n]*?space=vmem, size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+)"
)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A section of a kernel that has matmuls and is run or skipped as a whole, without nested sections of this kind."""

    cycles: int
    matmul_cycles: float  # with every matrix unit of the core busy

    @property
    def occupancy(self) -> float:
        return self.matmul_cycles / self.cycles


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One kernel: `passes` in order of their matmuls, the additional cycles of every step, and the cycles of parts
    without matmuls that a step may skip."""

    name: str
    passes: tuple[Pass, ...]
    step_cycles: int
    skipped_cycles: int
    cycles: int  # of the whole schedule, every pass once
    spills: int  # stores of registers to VMEM
    fills: int
    vmem_bytes: int

    @property
    def occupancy(self) -> float:
        """The occupancy of the largest pass."""
        return self.passes[-1].occupancy if self.passes else 0.0

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        passes = [{"cycles": p.cycles, "occupancy": round(p.occupancy, 3)} for p in self.passes]
        return dataclasses.asdict(self) | {"passes": passes}


@dataclasses.dataclass
class _Span:
    start: int
    end: int
    kind: str  # "loop", "skipped" or "program"
    children: list["_Span"] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator["_Span"]:
        yield self
        for child in self.children:
            yield from child.walk()


def compile_report(
    chip: str,
    function: Callable[..., Any],
    arguments: Sequence[jax.ShapeDtypeStruct],
    directory: pathlib.Path,
) -> list[KernelReport]:
    """Compiles for `chip` and reports on every program with matmuls.

    Args:
      directory: the directory given to `topology.open_compiler`; it is emptied first.
    """
    for path in directory.glob("*"):
        path.unlink()
    compile_for(chip, function, arguments)
    reports = read_reports(directory)
    require(bool(reports), f"{directory} holds no schedule; call open_compiler before anything loads libtpu")
    return reports


def read_reports(directory: pathlib.Path) -> list[KernelReport]:
    """The reports of all programs with matmuls whose schedules are in `directory`."""
    reports = (_read(path) for path in sorted(directory.glob(f"*{_UTILISATION}")))
    return [report for report in reports if report.passes]


def _read(path: pathlib.Path) -> KernelReport:
    stem = re.sub(r"-\d+$", "", path.name.removesuffix(_UTILISATION))
    units, rows = _read_utilisation(path)
    root = _spans(_one(path.parent, stem, _SCHEDULE).read_text(errors="replace"), len(rows))
    passes, shared = _passes(root, rows, units)
    return KernelReport(
        name=re.sub(r"^\d+-(transpose_|jvp_)*|_*(\.\d+)?$", "", stem),
        passes=tuple(sorted(passes, key=lambda p: (p.matmul_cycles, p.cycles))),
        step_cycles=shared,
        skipped_cycles=len(rows) - shared - sum(p.cycles for p in passes),
        cycles=len(rows),
        spills=sum(row[_SPILL] for row in rows),
        fills=sum(row[_FILL] for row in rows),
        vmem_bytes=_vmem(_one(path.parent, stem, _ALLOCATIONS).read_text(errors="replace")),
    )


def _one(directory: pathlib.Path, stem: str, suffix: str) -> pathlib.Path:
    pattern = re.compile(re.escape(stem) + r"-\d+" + re.escape(suffix))
    found = [path for path in directory.iterdir() if pattern.fullmatch(path.name)]
    require(len(found) == 1, f"{directory} holds {len(found)} files {stem}-*{suffix}; one is written for each kernel")
    return found[0]


def _read_utilisation(path: pathlib.Path) -> tuple[list[int], list[list[int]]]:
    """(number of units of each kind in the core, units of each kind used by each bundle)."""
    head, _, table = path.read_text().partition("== UTIL")
    rows = [[int(word) for word in line.split()] for line in table.splitlines()[1:] if line.strip()]
    return [int(word) for word in head.splitlines()[2].split()], rows


def _spans(schedule: str, bundles: int) -> _Span:
    """The nesting of loops and skippable code. Branches that cross each other are ignored."""
    root, spans, place = _Span(0, bundles, "program"), [], 0
    for line in schedule.splitlines():
        number = _NUMBER.match(line)
        place = int(number.group(1), 16) if number else place
        for branch in _BRANCH.finditer(line):
            target, after = int(branch.group(1)), place + 1 + _DELAY_SLOTS
            if target <= place:
                spans.append(_Span(target, min(after, bundles), "loop"))
            elif target > after:
                spans.append(_Span(after, target, "skipped"))
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        around = [other for other in root.walk() if other.start <= span.start and span.end <= other.end]
        parent = min(around, key=lambda other: other.end - other.start)
        crossing = any(other.start < span.end and span.start < other.end for other in parent.children)
        if (parent.start, parent.end) != (span.start, span.end) and not crossing:
            parent.children.append(span)
    return root


def _passes(root: _Span, rows: list[list[int]], units: list[int]) -> tuple[list[Pass], int]:
    """(the innermost spans with matmuls, the cycles around them that every step takes)."""

    def matmuls(span: _Span) -> int:
        return sum(row[_MATMUL] for row in rows[span.start : span.end])

    def innermost(span: _Span) -> list[_Span]:
        inner = [found for child in span.children if matmuls(child) for found in innermost(child)]
        return inner or ([span] if matmuls(span) else [])

    def shared(span: _Span) -> int:
        """The bundles of `span` that are neither in a pass nor skippable."""
        gone = sum(child.end - child.start for child in span.children if child.kind == "skipped" or child in found)
        within = [child for child in span.children if child.kind == "loop" and child not in found]
        return span.end - span.start - gone - sum(c.end - c.start for c in within) + sum(map(shared, within))

    found = innermost(root)
    passes = [Pass(span.end - span.start, matmuls(span) / units[_MATMUL]) for span in found]
    return passes, shared(root) if found != [root] else 0


def _vmem(text: str) -> int:
    """The end of the highest allocation."""
    ends = (int(match.group(1), 0) + int(match.group(2), 0) for match in _VMEM.finditer(text))
    return max(ends, default=0)

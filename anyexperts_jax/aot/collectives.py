"""The collectives of a compiled program: how often each runs, its bytes and its mesh axes.

They are read from the text of the optimised program. Loops count with their trip counts. Each branch of a conditional
counts once, so rounds that a step may skip are included.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from anyexperts_jax.core.errors import UserError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

DCN = "dcn"  # the axis between slices, over the data-centre network

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", re.M)
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.\-]+ = (.*)$", re.M)
_COLLECTIVE = re.compile(rf"^(.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r"known_trip_count\W+n\W+(\d+)")
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
_SEND = re.compile(r"^(.*?) send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_EXPLICIT = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective over one set of mesh axes."""

    kind: str
    axes: tuple[str, ...]  # empty: the groups match no set of mesh axes
    count: int  # runs per step
    bytes: int  # per step and device: the larger of input and output, summed over the runs


def read_collectives(program: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives in the text of an optimised program, by kind and axes, largest first.

    A program for several slices numbers the devices of one slice; its transfers to other slices get the axis `DCN`.

    Args:
      mesh: the sizes of the mesh axes inside a slice, slowest first; devices are numbered in that order.

    Raises:
      UserError: for a collective in a loop of unknown trip count.
    """
    bodies = _computations(program)
    runs = _runs(bodies)
    groups_to_axes = _axes_by_groups(mesh)
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[str, ...]]] = Counter()
    seen: set[tuple[str, str]] = set()
    for name, body in bodies.items():
        for line in _INSTRUCTION.findall(body) if runs[name] != 0 else ():
            row = _collective(line, name, groups_to_axes)
            chain = _CHAIN.search(line)
            if row is None or (chain and (chain[1], str(_CHANNEL.findall(line))) in seen):
                continue
            if chain:  # one collective is written out again in each of the steps it overlaps with: count it once
                seen.add((chain[1], str(_CHANNEL.findall(line))))
            times = runs[name]
            if times is None:
                raise UserError(f"cannot tell how often a loop runs that sends: {line[:120]!r}")
            counts[row.kind, row.axes] += times
            sizes[row.kind, row.axes] += times * row.bytes
    rows = [Collective(kind, axes, counts[kind, axes], sizes[kind, axes]) for kind, axes in counts]
    return sorted(rows, key=lambda row: (-row.bytes, row.kind, row.axes))


def _collective(
    line: str, computation: str, axes: Mapping[frozenset[tuple[int, ...]], tuple[str, ...]]
) -> Collective | None:
    """The collective of an instruction, for one run; None if the instruction is something else."""
    sent = _SEND.match(line)
    if sent:
        return Collective(sent[2].lower().replace("_", "-"), (DCN,), 1, _bytes(sent[1], "send", True, 1))
    found = _COLLECTIVE.match(line)
    if not found:
        return None
    groups = _groups(line)
    if all(len(group) < 2 for group in groups):
        return None
    # XLA's name on TPUs for an all-reduce of which each device keeps only its share.
    scattered = found[2] == "all-reduce" and computation.startswith("all-reduce-scatter")
    kind = "reduce-scatter" if scattered else found[2]
    size = _bytes(found[1], found[2], bool(found[3]), len(groups[0]))
    return Collective(kind, axes.get(frozenset(groups), ()), 1, size)


def _computations(program: str) -> dict[str, str]:
    """The text of every computation, by name."""
    headers = list(_COMPUTATION.finditer(program))
    ends = [header.start() for header in headers[1:]] + [len(program)]
    return {header[1]: program[header.start() : end] for header, end in zip(headers, ends, strict=True)}


def _runs(bodies: dict[str, str]) -> dict[str, int | None]:
    """How often a step runs each computation; None if that depends on the data."""
    callers: dict[str, list[tuple[str, int | None]]] = {name: [] for name in bodies}
    for name, body in bodies.items():
        for line in _INSTRUCTION.findall(body):
            condition = _CONDITION.search(line)
            trips = _trip_count(line, bodies.get(condition[1], ""), bodies) if condition else 1
            for called in _CALLED.findall(line):
                for target in re.findall(r"[\w.\-]+", called):
                    if target in callers:
                        callers[target].append((name, trips))
    entry = next(name for name, body in bodies.items() if body.startswith("ENTRY"))
    runs: dict[str, int | None] = {entry: 1}

    def run(name: str) -> int | None:
        if name not in runs:
            pairs = [(run(caller), trips) for caller, trips in callers[name]]
            known = [times * trips for times, trips in pairs if times is not None and trips is not None]
            runs[name] = sum(known) if len(known) == len(pairs) else None
        return runs[name]

    return {name: run(name) for name in bodies}


def _trip_count(line: str, condition: str, bodies: dict[str, str]) -> int | None:
    known = _TRIP_COUNT.search(line)
    if known:
        return int(known[1])
    called = [bodies[name] for name in re.findall(r"calls=%?([\w.\-]+)", condition) if name in bodies]
    bounds = {int(bound) for text in (condition, *called) for bound in _CONSTANT.findall(text)}
    return bounds.pop() if len(bounds) == 1 else None


def _bytes(result: str, kind: str, started: bool, group: int) -> int:
    arrays = [
        math.prod(map(int, filter(None, shape.split(",")))) * _itemsize(dtype)
        for dtype, shape in _ARRAY.findall(result)
    ]
    size = max(arrays) if started and kind != "all-reduce" else sum(arrays)
    return size * (group if kind == "reduce-scatter" else 1)


def _itemsize(dtype: str) -> int:
    return 1 if dtype == "pred" or dtype.startswith("f8") else max(1, int(re.findall(r"\d+", dtype)[0]) // 8)


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """The device numbers of each group of a collective."""
    if named := _NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        return groups_of(sizes, re.findall(r"'([^']*)'", named[2]))
    if iota := _IOTA.search(line):
        shape, dims = ([int(n) for n in text.split(",")] for text in iota.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in iota[3].split(",")]) if iota[3] else ids
        return _sorted(ids.reshape(shape))
    if explicit := _EXPLICIT.search(line):
        return _sorted([[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", explicit[1])])
    return ((),)


def groups_of(sizes: Mapping[str, int], axes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that differ only along `axes`."""
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    names = list(sizes)
    ids = np.moveaxis(ids, [names.index(axis) for axis in axes], range(-len(axes), 0)) if axes else ids[..., None]
    return _sorted(ids.reshape(-1, math.prod(sizes[axis] for axis in axes)))


def _axes_by_groups(mesh: Mapping[str, int]) -> dict[frozenset[tuple[int, ...]], tuple[str, ...]]:
    axes = [axis for axis, size in mesh.items() if size > 1]

    def subsets() -> Iterator[tuple[str, ...]]:
        for count in range(1, len(axes) + 1):
            yield from itertools.combinations(axes, count)

    return {frozenset(groups_of(mesh, subset)): subset for subset in subsets()}


def _sorted(groups: object) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(int(n) for n in group)) for group in groups)  # type: ignore[attr-defined]

"""A lower bound on the time of collectives on a chip's network, for any algorithm.

The devices of any part of a slice must receive what they need from outside through the links into that part. For TPUs
the parts are single chips and the blocks between two planes across a dimension of the torus; for GPUs single devices
and nodes. A step cannot be faster than the part that takes longest to receive the data of all collectives.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.aot.collectives import DCN, Collective, groups_of
from anyexperts_jax.core.hardware import Chip, Tpu


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Parts of a slice: the devices in each, in the mesh's order, and the bandwidth into it in bytes/s."""

    inside_PN: np.ndarray
    capacity_P: np.ndarray


def cuts_of(devices: Sequence[Any], chip: Chip) -> Cuts:
    """The parts of a slice with these devices, given in the mesh's order."""
    return _torus_cuts(devices, chip) if isinstance(chip, Tpu) else _node_cuts(devices, chip)


def _torus_cuts(devices: Sequence[Any], chip: Tpu) -> Cuts:
    coords = np.array([device.coords for device in devices])
    shape = [int(length) for length in coords.max(0) - coords.min(0) + 1]
    coords = coords - coords.min(0)
    rings = [length > 2 and length % chip.wraps_at == 0 for length in shape]
    inside, capacity = [], []
    for place in np.unique(coords, axis=0):
        where = zip(place.tolist(), shape, rings, strict=True)
        links = sum(2 if ring else (at > 0) + (at < length - 1) for at, length, ring in where)
        inside.append((coords == place).all(1))
        capacity.append(links * chip.link_gbs * 1e9)
    for axis, (length, ring) in enumerate(zip(shape, rings, strict=True)):
        across = math.prod(shape) // length  # links between two neighbouring planes
        for first in range(length):
            for last in range(first + 1, first + length if ring else length + 1):
                planes = np.arange(first, last) % length
                if len(planes) == length:
                    continue
                borders = 2 if ring else (first > 0) + (last < length)
                inside.append(np.isin(coords[:, axis], planes))
                capacity.append(borders * across * chip.link_gbs * 1e9)
    return Cuts(np.array(inside), np.maximum(np.array(capacity), 1.0))  # 1: a single chip has no links, but no traffic


def _node_cuts(devices: Sequence[Any], chip: Chip) -> Cuts:
    nodes = np.array([device.process_index for device in devices])
    alone = np.eye(len(devices), dtype=bool)
    names = np.unique(nodes)
    together = nodes == names[:, None] if len(names) > 1 else np.zeros((0, len(devices)), bool)
    capacity = np.concatenate(
        [
            np.full(len(devices), chip.link_gbs * 1e9),
            together.sum(1) * chip.dcn_gbs * 1e9,
        ]
    )
    return Cuts(np.concatenate([alone, together]), capacity)


def owed_bytes(row: Collective, mesh: Mapping[str, int], cuts: Cuts) -> np.ndarray:
    """The bytes per step that must enter each part of `cuts` for one row of collectives."""
    count = cuts.inside_PN.shape[1]
    groups_GN = np.array(groups_of(mesh, row.axes)) if row.axes else np.arange(count).reshape(-1, 2)
    size = groups_GN.shape[1]
    inside_PG = cuts.inside_PN[:, groups_GN].sum(2)
    outside_PG = size - inside_PG
    touched_PG = (inside_PG > 0) & (outside_PG > 0)
    share = row.bytes / size
    if row.kind in ("all-to-all", "ragged-all-to-all"):
        owed_PG = inside_PG * outside_PG * share
    elif row.kind == "all-reduce":  # a reduce-scatter, then an all-gather
        owed_PG = touched_PG * (outside_PG + np.maximum(inside_PG, outside_PG)) * share
    elif row.kind == "reduce-scatter":
        owed_PG = touched_PG * np.maximum(inside_PG, outside_PG) * share
    elif row.kind == "all-gather":
        owed_PG = touched_PG * outside_PG * share
    else:  # for permutes the pairs of devices are not read, so nothing is bounded
        owed_PG = np.zeros_like(inside_PG, dtype=float)
    return owed_PG.sum(1)


def network_seconds(
    rows: Sequence[Collective], devices: Sequence[Any], mesh: Mapping[str, int], chip: Chip
) -> tuple[tuple[float, ...], float, float]:
    """(least seconds of each row by itself, of all collectives inside a slice, of all between slices).

    Args:
      devices: the devices of one slice, in the mesh's order.
      mesh: the sizes of the mesh's axes inside one slice.
    """
    cuts = cuts_of(devices, chip)
    total_P, between = np.zeros(len(cuts.capacity_P)), 0.0
    alone: list[float] = []
    for row in rows:
        if DCN in row.axes:
            alone.append(row.bytes * (2 if row.kind == "all-reduce" else 1) / (chip.dcn_gbs * 1e9 / chip.per_chip))
            between += alone[-1]
            continue
        seconds_P: np.ndarray = owed_bytes(row, mesh, cuts) / cuts.capacity_P
        total_P += seconds_P
        alone.append(max(seconds_P.tolist(), default=0.0))
    return tuple(alone), max(total_P.tolist(), default=0.0), between

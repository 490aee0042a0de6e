"""Lower bounds on the time of a step on a chip, and the model FLOPs utilisation (MFU) at that time."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from anyexperts_jax.aot.collectives import Collective
from anyexperts_jax.aot.network import network_seconds
from anyexperts_jax.aot.work import Work
from anyexperts_jax.core.hardware import Chip
from anyexperts_jax.sharding.mesh import slice_of


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Lower bounds on a step, in seconds, each as if nothing else limited it. They are not measured times."""

    arithmetic: float  # all FLOPs at the chip's peak
    hbm: float  # the state read and written once, weights read in each pass, logits
    network: float  # all collectives inside a slice
    between_slices: float  # collectives over the data-centre network
    collectives: tuple[float, ...]  # each row of collectives by itself
    mfu: float  # the real FLOPs as a share of the peak, if the step takes its largest bound

    @property
    def step(self) -> float:
        """The largest bound: the step cannot be faster, even with perfect overlap."""
        return max(self.arithmetic, self.hbm, self.network, self.between_slices)


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a step needs at least, besides communication."""

    flops: float  # all matmuls, over all devices
    real_flops: float  # those of them that count for the MFU
    hbm_bytes: float  # that each device reads and writes


def train_demand(work: Work, state: int) -> Demand:
    """Returns the demand of a train step whose state takes `state` bytes on a device: it is read and written once."""
    return Demand(work.flops, sum(work.real_flops.values()), 2 * state + work.hbm_bytes)


def find_bounds(
    demand: Demand, collectives: Sequence[Collective], devices: Sequence[Any], mesh: Mapping[str, int], chip: Chip
) -> Bounds:
    """Returns the bounds of a step.

    Args:
      devices: the devices of all slices, in the mesh's order.
      mesh: the sizes of the mesh axes inside one slice.
    """
    one_slice = [device for device in devices if slice_of(device) == slice_of(devices[0])]
    alone, network, between = network_seconds(collectives, one_slice, mesh, chip)
    arithmetic = demand.flops / len(devices) / chip.flops
    hbm = demand.hbm_bytes / (chip.hbm_gbs * 1e9)
    longest = max(arithmetic, hbm, network, between)
    mfu = demand.real_flops / len(devices) / chip.flops / longest
    return Bounds(arithmetic=arithmetic, hbm=hbm, network=network, between_slices=between, collectives=alone, mfu=mfu)

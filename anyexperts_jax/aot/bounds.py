"""Lower bounds on the time of a step on a chip, and the model FLOPs utilisation (MFU) at that time."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from anyexperts_jax.aot.collectives import Collective
from anyexperts_jax.aot.network import network_seconds
from anyexperts_jax.aot.work import Work
from anyexperts_jax.core.hardware import Chip


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


def find_bounds(
    work: Work,
    state: int,
    collectives: Sequence[Collective],
    devices: Sequence[Any],
    num_devices: int,
    mesh: Mapping[str, int],
    chip: Chip,
) -> Bounds:
    """The bounds of a step.

    Args:
      state: bytes of the train state on one device.
      devices: the devices of one slice, in the order of `mesh`, the mesh inside the slice.
      num_devices: the number of devices in all slices.
    """
    alone, network, between = network_seconds(collectives, devices, mesh, chip)
    arithmetic = work.flops / num_devices / chip.flops
    hbm = (2 * state + work.hbm_bytes) / (chip.hbm_gbs * 1e9)
    longest = max(arithmetic, hbm, network, between)
    mfu = sum(work.real_flops.values()) / num_devices / chip.flops / longest
    return Bounds(arithmetic=arithmetic, hbm=hbm, network=network, between_slices=between, collectives=alone, mfu=mfu)

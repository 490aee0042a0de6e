"""The sizes of the exchange's buffers: how many rows and slots the budget sends from one device to another."""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from anyexperts_jax.core.errors import require
from anyexperts_jax.routing.plan import PlanSpec

_SAMPLED_TOKENS = 4096  # their mean is within 1% of the expectation


class BufferSizes(NamedTuple):
    """The room of a buffer from one device to another."""

    rows: int  # one for each token that has an expert there
    slots: int  # of these rows together


def buffer_sizes(
    spec: PlanSpec, capacity_factor: float, num_tokens: int, num_devices: int, slots_bound: int
) -> BufferSizes:
    """The sizes for a device with `num_tokens` tokens: capacity_factor times what the budget expects of rows and slots.

    There is always room for one whole token, and never for more than all tokens with all their slots.

    Args:
      num_devices: the devices that the experts are split over.
      slots_bound: K, the most slots of a token.
    """
    rows = capacity_factor * expected_devices(spec, num_devices) * num_tokens / num_devices
    slots = capacity_factor * spec.expected_real_slots * num_tokens / num_devices
    return BufferSizes(
        rows=min(num_tokens, max(1, math.ceil(rows))),
        slots=min(num_tokens * slots_bound, max(slots_bound, math.ceil(slots))),
    )


def expected_devices(spec: PlanSpec, num_devices: int) -> float:
    """The mean number of devices that hold some of a token's experts, if no expert is preferred to another.

    A token has the budget's number of real slots, rounded down or up. If numbers vary more, as importance makes them,
    the mean is lower: the number of devices is concave in the number of slots.

    Raises:
      UserError: for experts that do not split over the devices.

    Example: 8 of 256 experts lie on 5.3 of 8 devices; with the best 4 of 8 groups on 4.0.
    """
    require(spec.num_experts % num_devices == 0, f"{spec.num_experts} experts do not split over {num_devices} devices")
    in_reach = spec.num_experts // spec.num_groups * spec.groups_kept
    slots = min(spec.expected_real_slots, in_reach)
    fewer, share = int(slots), slots - int(slots)
    low, high = (_devices_of(spec, num_devices, min(k, in_reach)) for k in (fewer, fewer + 1))
    return (1 - share) * low + share * high


def _devices_of(spec: PlanSpec, num_devices: int, slots: int) -> float:
    if spec.groups_kept == spec.num_groups:
        return uniform_devices(spec.num_experts, num_devices, slots)
    means_K = _grouped_devices(spec.num_experts, (spec.num_groups, spec.groups_kept), num_devices)
    return means_K[slots - 1] if slots else 0.0


def uniform_devices(num_experts: int, num_devices: int, slots: int) -> float:
    """The expected number of devices that hold some of `slots` distinct experts, all sets equally likely."""
    elsewhere = num_experts - num_experts // num_devices
    return num_devices * (1 - math.comb(elsewhere, slots) / math.comb(num_experts, slots))


@functools.cache
def _grouped_devices(num_experts: int, groups: tuple[int, int], num_devices: int) -> tuple[float, ...]:
    """`uniform_devices` for 1, 2, ... slots, with experts of the best groups only: the mean over tokens with random
    scores. Kept groups are those of high scores, so it has no closed form. The seed is fixed, so all processes agree.
    """
    num_groups, kept = groups
    scores_NGS = np.random.default_rng(0).random((_SAMPLED_TOKENS, num_groups, num_experts // num_groups))
    best_NG = np.sort(scores_NGS, axis=-1)[..., -2:].sum(-1)  # as `routing.groups` ranks them
    others_NG = np.argsort(-best_NG, axis=-1)[:, kept:]
    np.put_along_axis(scores_NGS, others_NG[..., None], -1.0, axis=1)
    ids_NK = np.argsort(-scores_NGS.reshape(_SAMPLED_TOKENS, -1), axis=-1)[:, : num_experts // num_groups * kept]
    return tuple(_distinct(ids_NK // (num_experts // num_devices), num_devices))


def _distinct(devices_NK: Int[np.ndarray, "N K"], num_devices: int) -> list[float]:
    """The mean number of distinct devices among the first 1, 2, ... slots."""
    seen_ND = np.zeros((len(devices_NK), num_devices), bool)
    means = []
    for device_N in devices_NK.T:
        seen_ND[np.arange(len(seen_ND)), device_N] = True
        means.append(float(seen_ND.sum(-1).mean()))
    return means

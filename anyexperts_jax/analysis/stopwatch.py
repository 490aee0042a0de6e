"""Times that can be compared: everything is run in turn, A B A B, so that a busy machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleaved_rounds(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one warm-up each."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """The median over rounds of time over the reference's in the same round: noise that lasts a round cancels."""
    return statistics.median(own / other for own, other in zip(seconds, reference, strict=True))

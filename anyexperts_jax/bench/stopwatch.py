"""Comparable times: all calls are interleaved, A B A B, so that a busy machine slows all of them alike.

This is not exact: a library that splits each matmul evenly over the cores waits for the slowest core. So the load of
other processes is measured too, and a benchmark can wait until it ends.
"""

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

_STAT = pathlib.Path("/proc/stat")
_QUIET = 0.1  # cores


class CpuTimes(NamedTuple):
    """Seconds since an arbitrary start."""

    wall: float
    busy: float  # CPU seconds of all cores in all processes
    own: float  # CPU seconds of this process


def cpu_times() -> CpuTimes | None:
    """The current CPU times; None if the system has no /proc."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _iowait, *rest = (int(ticks) for ticks in _STAT.read_text().split("\n")[0].split()[1:9])
    own = os.times()
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return CpuTimes(time.perf_counter(), busy, own.user + own.system)


def others_load(start: CpuTimes | None) -> float | None:
    """The mean number of cores that other processes kept busy since `start`."""
    now = cpu_times()
    if start is None or now is None or now.wall <= start.wall:
        return None
    return max(0.0, (now.busy - start.busy - now.own + start.own) / (now.wall - start.wall))


def wait_for_quiet(patience: float) -> None:
    """Waits until other processes are idle for two seconds, at most `patience` seconds."""
    deadline = time.perf_counter() + patience
    while time.perf_counter() < deadline:
        start = cpu_times()
        time.sleep(2)
        load = others_load(start)
        if load is None or load < _QUIET:
            return


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The seconds of each call in each round, and the mean number of cores that other processes kept busy."""

    seconds: dict[str, list[float]]
    others_load: float | None

    def milliseconds(self, name: str) -> float:
        """The median time."""
        return 1e3 * statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> float:
        """The median over rounds of the time relative to the reference in the same round, where slow noise cancels."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(own / other for own, other in pairs)


def interleaved_rounds(
    calls: Mapping[str, Callable[[], Any]], rounds: int, patience: float = 0.0, repeats: int = 1
) -> Rounds:
    """Warms up every call, waits up to `patience` seconds for an idle machine, and runs all in turn `rounds` times.

    Each turn starts with an untimed call. While the others ran, a virtual machine may have returned freed memory to its
    host; the untimed call pays for getting it back, so that the timed one behaves as in a loop of one program.

    Args:
      repeats: calls per sample, made back to back; the sample is their mean. So an accelerator always has work queued,
        as in training, and the host's launch time is hidden.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    wait_for_quiet(patience)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begin = cpu_times()
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            for _ in range(repeats):
                last = call()
            jax.block_until_ready(last)
            seconds[name].append((time.perf_counter() - start) / repeats)
    return Rounds(seconds, others_load(begin))

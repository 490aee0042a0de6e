"""Times that can be compared: everything is run in turn, A B A B, so that a busy machine slows all alike.

Not quite alike, though: a library that splits each matmul evenly over the cores waits for the slowest, so the load of
other processes is measured too, and a benchmark can wait for it to go away.
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
    """Seconds since some start."""

    wall: float
    busy: float  # of all cores, in all processes
    own: float  # in this process


def cpu_times() -> CpuTimes | None:
    """None where the system does not tell (no /proc)."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _iowait, *rest = (int(ticks) for ticks in _STAT.read_text().split("\n")[0].split()[1:9])
    own = os.times()
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return CpuTimes(time.perf_counter(), busy, own.user + own.system)


def others_load(start: CpuTimes | None) -> float | None:
    """The cores that other processes kept busy since `start`, on average."""
    now = cpu_times()
    if start is None or now is None or now.wall <= start.wall:
        return None
    return max(0.0, (now.busy - start.busy - now.own + start.own) / (now.wall - start.wall))


def wait_for_quiet(patience: float) -> None:
    """Returns when other processes leave the machine alone for two seconds, or after `patience` seconds."""
    deadline = time.perf_counter() + patience
    while time.perf_counter() < deadline:
        start = cpu_times()
        time.sleep(2)
        load = others_load(start)
        if load is None or load < _QUIET:
            return


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Seconds of each call in each round, and the cores that other processes kept busy meanwhile."""

    seconds: dict[str, list[float]]
    others_load: float | None

    def milliseconds(self, name: str) -> float:
        """The median."""
        return 1e3 * statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> float:
        """The median over rounds of time over the reference's in the same round: noise that lasts a round cancels."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(own / other for own, other in pairs)


def interleaved_rounds(
    calls: Mapping[str, Callable[[], Any]], rounds: int, patience: float = 0.0, repeats: int = 1
) -> Rounds:
    """Warms every call up, waits for quiet up to `patience` seconds, and runs all of them in turn `rounds` times.

    A turn begins with a call that is not timed. What comes next is as in a loop of one program: a virtual machine may
    have given memory that a call has freed back to its host while the others ran, and the next call pays for it.

    Args:
      repeats: a call is made so many times on end and the time is theirs over their number: an accelerator then has
        its next work waiting, as in training, and the host's time to start a call hides behind the one before.
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

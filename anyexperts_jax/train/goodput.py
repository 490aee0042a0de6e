"""Goodput, the share of wall time spent in steps, and the times of the steps."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

PARTS = ("start", "compile", "data", "validation", "checkpoint")


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds from the end of one step to the end of the next, minus time spent on other parts."""

    median: float
    p95: float
    slowest: float


@dataclasses.dataclass(frozen=True)
class TimeReport:
    """The time one process has spent since its start."""

    seconds: dict[str, float]  # "step" and PARTS; they add up to the wall time
    steps: int  # steps taken
    step_times: StepTimes | None  # None before the second step

    @property
    def goodput(self) -> float:
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def record(self) -> dict[str, object]:
        """The fields for metrics.jsonl: goodput and the share of each part."""
        wall = max(sum(self.seconds.values()), 1e-9)
        return {"goodput": self.goodput, "time_shares": {name: each / wall for name, each in self.seconds.items()}}


class Clock:
    """Attributes every second of wall time once: to one of PARTS if so marked, else to the steps.

    "start" is the time until `begin_steps` (reading files, restoring, creating the state), and opening files after it.
    "data" is the time waiting for a batch while the device is idle; a batch made while a step runs costs nothing.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._began = now()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._in_steps = False
        self._last: tuple[float, float] | None = None  # wall and spent time at the end of the previous step
        self._times: list[float] = []
        self._steps = 0
        self._logged = 0  # number of `_times` that `window` has reported

    def begin_steps(self) -> None:
        self._seconds["start"] = self._now() - self._began
        self._in_steps = True

    @contextlib.contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Attributes the time inside the context to `part`."""
        start = self._now()
        try:
            yield
        finally:
            self.add(part, self._now() - start)

    def add(self, part: str, seconds: float) -> None:
        if self._in_steps:
            self._seconds[part] += seconds

    def step_done(self) -> None:
        now, spent = self._now(), sum(self._seconds.values())
        if self._last is not None:
            self._times.append(now - self._last[0] - (spent - self._last[1]))
        self._last = (now, spent)
        self._steps += 1

    def window(self) -> StepTimes | None:
        """The times of the steps since the last call."""
        times, self._logged = self._times[self._logged :], len(self._times)
        return _step_times(times)

    def report(self) -> TimeReport:
        wall = self._now() - self._began
        spent = self._seconds if self._in_steps else {**self._seconds, "start": wall}
        return TimeReport({"step": wall - sum(spent.values()), **spent}, self._steps, _step_times(self._times))


def _step_times(times: list[float]) -> StepTimes | None:
    if not times:
        return None
    median, p95 = np.percentile(times, [50, 95])
    return StepTimes(float(median), float(p95), max(times))

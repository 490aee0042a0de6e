"""Runs several runs at a time, each in a process on its own cores, until all are done or the time is up."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from anyexperts_jax.core.errors import require
from anyexperts_jax.train.stops import RunInterruptedError, StopRequests
from experiments.reproduce.experiment import Run
from experiments.reproduce.run_folder import LOG_NAME, finished, prepare
from experiments.reproduce.shared_stages import missing_stages

GRACE_SECONDS = 20.0  # for writing a checkpoint before a process is killed
_POLL_SECONDS = 0.2
_CACHE_NAME = "compiled"
WORKER = (sys.executable, "-m", "experiments.reproduce.worker")  # FOLDER and CORES follow

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of the requested runs."""

    done: tuple[Run, ...]  # now or earlier
    failed: tuple[tuple[Run, str], ...]  # with the last line of its log
    left: tuple[Run, ...]  # not started, or stopped when the time was up


@dataclasses.dataclass
class _Running:
    run: Run
    process: subprocess.Popen
    log: pathlib.Path
    slot: int
    since: float


def run_all(
    runs: Sequence[Run],
    root: pathlib.Path,
    *,
    workers: int,
    deadline: float | None = None,
    note: Note = lambda line: None,
    worker: Sequence[str] = WORKER,
) -> Outcome:
    """Finishes `runs` in order, `workers` at a time; runs that have a result are not repeated.

    A run that needs a stage which another run is training waits, and the next one goes first.

    Args:
      root: where each run has its folder.
      deadline: seconds from now, after which no run is started and running ones stop, with a checkpoint if training.
      note: called with a line as each run starts and ends.
      worker: the command that finishes one run.

    Raises:
      UserError: for a number out of range, or a result that this version did not write.
      RunInterruptedError: after SIGINT or SIGTERM, once all processes are stopped.
    """
    require(workers >= 1, f"workers={workers} must be >= 1")
    require(deadline is None or deadline > 0, f"deadline={deadline} must be > 0 seconds")
    todo = [run for run in runs if finished(run, root) is None]
    note(f"{len(runs)} runs, {len(runs) - len(todo)} done before, {len(todo)} to do, {workers} at a time")
    pool = _Pool(root, core_shares(workers), note, worker)
    end = None if deadline is None else time.monotonic() + deadline
    with StopRequests() as requests:
        try:
            while (todo or pool.running) and not (end is not None and time.monotonic() >= end):
                if requests.signal_number is not None:
                    raise RunInterruptedError("stopped; run the same command to go on", requests.signal_number)
                while pool.free and (ready := pool.first_ready(todo)) is not None:
                    todo.remove(ready)
                    pool.start(ready)
                time.sleep(_POLL_SECONDS)
                pool.collect()
        finally:
            pool.stop()
    done = tuple(run for run in runs if finished(run, root) is not None)
    failed = tuple(pool.failed)
    out = {run.id for run in (*done, *(run for run, _ in failed))}
    return Outcome(done, failed, tuple(run for run in runs if run.id not in out))


def core_shares(workers: int) -> list[tuple[int, ...]]:
    """Returns the cores of each of `workers` processes: a share of this process's cores, or one of them in turn."""
    if not hasattr(os, "sched_getaffinity"):
        return [(0,)] * workers  # this system cannot pin processes to cores, so the numbers mean nothing
    cores = sorted(os.sched_getaffinity(0))
    if workers >= len(cores):
        return [(cores[i % len(cores)],) for i in range(workers)]
    ends = [len(cores) * i // workers for i in range(workers + 1)]
    return [tuple(cores[begin:end]) for begin, end in itertools.pairwise(ends)]


class _Pool:
    """The running processes. Each leads its own session, so that Ctrl-C reaches it only once, through `stop`."""

    def __init__(
        self, root: pathlib.Path, shares: Sequence[tuple[int, ...]], note: Note, worker: Sequence[str]
    ) -> None:
        self.root, self.shares, self.note, self.worker = root, shares, note, worker
        self.free = list(range(len(shares)))[::-1]
        self.running: list[_Running] = []
        self.failed: list[tuple[Run, str]] = []

    def first_ready(self, todo: Sequence[Run]) -> Run | None:
        """Returns the first run that need not wait for a stage in training; None if all must."""
        if not todo:
            return None
        busy = frozenset[str]().union(*(missing_stages(one.run, self.root) for one in self.running))
        return next((run for run in todo if not busy & missing_stages(run, self.root)), None)

    def start(self, run: Run) -> None:
        slot = self.free.pop()
        folder = prepare(run, self.root)
        cores = ",".join(map(str, self.shares[slot]))
        command = [*self.worker, str(folder), cores]
        log = folder / LOG_NAME
        with log.open("a") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(os.environ, self.root),
                start_new_session=True,
            )
        self.running.append(_Running(run, process, log, slot, time.monotonic()))
        self.note(f"start {_label(run)}")

    def collect(self) -> None:
        """Collects the processes that have ended."""
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            self.free.append(one.slot)
            seconds = time.monotonic() - one.since
            if one.process.returncode == 0:
                self.note(f"done  {_label(one.run)} in {seconds:.0f} s")
            else:
                last = _last_line(one.log)
                self.failed.append((one.run, last))
                self.note(f"FAILED {_label(one.run)} after {seconds:.0f} s, code {one.process.returncode}: {last}")

    def stop(self) -> None:
        """Ends running processes with SIGTERM, upon which training writes a checkpoint, or at last with SIGKILL."""
        self.collect()
        for one in self.running:
            one.process.terminate()
        end = time.monotonic() + GRACE_SECONDS
        for one in self.running:
            try:
                one.process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            self.note(f"stopped {_label(one.run)}")
        self.running = []


def _environment(base: Mapping[str, str], root: pathlib.Path) -> dict[str, str]:
    """Returns the workers' environment: they share a cache of compiled programs and, on a GPU, its memory."""
    wanted = {
        "JAX_COMPILATION_CACHE_DIR": str((root / _CACHE_NAME).absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    return {**wanted, **base}


def _label(run: Run) -> str:
    return f"{run.name}, seed {run.config.seed} ({run.id})"


def _last_line(log: pathlib.Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"

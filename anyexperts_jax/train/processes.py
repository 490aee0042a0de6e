"""Runs with several processes: how they find each other, agree at every step, and exit if one of them dies.

Every process runs the same command. The processes are described on the command line, by JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by the cluster, which `jax.distributed.initialize` detects.
"""

import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anyexperts_jax.core.checks import INT32
from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.train.stops import PeerLostError

AUTO = "auto"
CLOUD_TPU_PORT = 8482  # port of JAX's coordinator on TPUs; under Slurm it is derived from the job id
_MESSAGE_BYTES = 1024  # length of an error message that is sent to the other processes
HEARTBEAT_MARGIN = 60.0  # seconds by which JAX's own check is later than ours, because it prints a stack trace


@dataclasses.dataclass(frozen=True)
class Peers:
    """The number of processes of a run and this one's index. None: the cluster decides."""

    count: int | None = None
    index: int | None = None
    coordinator: str | None = None  # HOST:PORT, where process 0 listens


def find_peers(
    processes: str | None, index: int | None, coordinator: str | None, environment: Mapping[str, str] = os.environ
) -> Peers | None:
    """The processes of the run, from command-line options or else the environment; None: a single process.

    Args:
      processes: "1": a single process, whatever the environment says; "auto": ask the cluster; any other number
        requires the other two options.

    Raises:
      UserError: for an incomplete description, or numbers that do not fit each other.
    """
    if processes == "1" and index in (None, 0):
        return None
    if processes == AUTO:
        require(index is None and coordinator is None, "--processes auto takes no --process-index and no --coordinator")
        return Peers()
    given = {
        "--processes (JAX_NUM_PROCESSES)": processes or environment.get("JAX_NUM_PROCESSES"),
        "--process-index (JAX_PROCESS_ID)": environment.get("JAX_PROCESS_ID") if index is None else str(index),
        "--coordinator (JAX_COORDINATOR_ADDRESS)": coordinator or environment.get("JAX_COORDINATOR_ADDRESS"),
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return Peers() if in_cluster(environment) else None
    require(not missing, f"several processes need {' and '.join(missing)} as well, or --processes auto on a cluster")
    count, number, address = given.values()
    return _checked(str(count), str(number), str(address))


def in_cluster(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this as one of several processes: a Slurm step or a TPU pod on GKE.

    On a Cloud TPU VM this takes a network request, which only `--processes auto` makes.
    """
    slurm = all(name in environment for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"))
    several_tasks = slurm and environment.get("SLURM_NTASKS", "1") != "1"
    several_slices = environment.get("MEGASCALE_NUM_SLICES", "1") != "1"
    return several_tasks or several_slices or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def require_alone(processes: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Checks that this is the only process. Of several, each would do the whole work and write the same files.

    Raises:
      UserError: if `processes` or the environment describes several processes; `processes="1"` overrides the latter.
    """
    if processes == "1":
        return
    given = {"--processes": processes, "JAX_NUM_PROCESSES": environment.get("JAX_NUM_PROCESSES")}
    asked = next((f"{name}={value}" for name, value in given.items() if value not in (None, "1")), None)
    if asked is None and in_cluster(environment):
        asked = "the environment of a cluster's job"
    require(
        asked is None, f"{asked}: only `train` runs in several processes; start this once, or alone with --processes 1"
    )


def _checked(count: str, index: str, coordinator: str) -> Peers:
    require(count.isdecimal() and int(count) >= 1, f"--processes={count} must be a number >= 1, or auto")
    require(int(count) in INT32, f"--processes={count} must be below 2^31")
    inside = index.isdecimal() and int(index) < int(count)
    require(inside, f"--process-index={index} must be in [0, --processes={count})")
    host, colon, port = coordinator.rpartition(":")
    well_formed = bool(host and colon) and port.isdecimal() and 0 < int(port) < 65536
    require(well_formed, f"--coordinator={coordinator} must read HOST:PORT")
    return Peers(int(count), int(index), coordinator)


def connect(peers: Peers, timeout: float) -> None:
    """Connects to the other processes, before any other use of JAX. First prints one line about what it waits for.

    A process that waits for longer than `timeout` seconds exits with one line and exit code 5.

    Raises:
      UserError: if JAX finds no cluster.
    """
    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would replace the training loop's
    if peers.count is None:
        who, where, port = "this process", " that the cluster names", _port_by_default(os.environ)
    else:
        who, where, port = f"process {peers.index} of {peers.count}", f" at {peers.coordinator}", "that port"
    advice = f"start the same command on every host, let them reach {port}, or wait longer"
    message = f"{who} waited {timeout:g} s for the others{where}; {advice} (runtime.peer_timeout)"
    start = f"{who} waits for the others{where}, {timeout:g} s at most (runtime.peer_timeout)"
    print(f"anyexperts: {start}", file=sys.stderr, flush=True)
    try:
        with Watch(timeout, lambda _: message).waiting("the others"):
            jax.distributed.initialize(
                peers.coordinator,
                peers.count,
                peers.index,
                initialization_timeout=int(timeout + HEARTBEAT_MARGIN),
                heartbeat_timeout_seconds=int(timeout + HEARTBEAT_MARGIN),
                shutdown_timeout_seconds=int(timeout + HEARTBEAT_MARGIN),
            )
            jax.devices()  # waits for the devices of all processes
    except ValueError as error:  # JAX raises it if it finds no cluster
        line = one_line(error)
        raise UserError(
            f"JAX finds no cluster here ({line}); give --processes, --process-index, --coordinator"
        ) from error


def _port_by_default(environment: Mapping[str, str]) -> str:
    """A description of process 0's port if its address is not given."""
    given = environment.get("JAX_COORDINATOR_PORT")
    default = f"port {CLOUD_TPU_PORT} on TPUs, one from 61440 to 65535 under Slurm; JAX_COORDINATOR_PORT sets another"
    return f"port {given} of process 0" if given else f"JAX's port of process 0 ({default})"


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes logs, shows progress and names the run's files."""
    return jax.process_index() == 0


def require_agreement(what: str, values: Mapping[str, int], advice: str) -> None:
    """Checks that each number is the same in all processes.

    Raises:
      UserError: in every process, naming the first value that differs and two processes with their values.
    """
    if not several():
        return
    everywhere = multihost_utils.process_allgather(np.asarray(list(values.values()), np.int32))
    for name, column in zip(values, everywhere.T, strict=True):
        other = next((index for index, value in enumerate(column) if value != column[0]), None)
        if other is not None:
            raise UserError(f"{what}: {name} is {column[0]} in process 0 and {column[other]} in {other}; {advice}")


def share() -> tuple[int, int]:
    """(index, count) of this process, to divide work among the processes."""
    return jax.process_index(), jax.process_count()


def raise_together(error: UserError | None) -> None:
    """Raises an error in every process if any of them has one. Every process must call this, even without an error.

    Raises:
      UserError: this process's error, or else the first one of another process.
    """
    if several():
        said = np.zeros(_MESSAGE_BYTES, np.uint8)
        text = np.frombuffer(("" if error is None else str(error)).encode(errors="replace")[:_MESSAGE_BYTES], np.uint8)
        said[: len(text)] = text
        others = [row.tobytes().rstrip(b"\0") for row in multihost_utils.process_allgather(said)]
        first = next(filter(None, others), b"")
        error = error or (UserError(first.decode(errors="replace")) if first else None)
    if error is not None:
        raise error


def wait_for_all(name: str) -> None:
    """A barrier: returns once every process has called it."""
    if several():
        multihost_utils.sync_global_devices(name)


class Agreement:
    """The maximum over all processes of some small numbers, so that all of them act on the same values at the same
    step.

    Asked before a step starts and read after it, so it costs no more than a small all-reduce. With one process it costs
    nothing.
    """

    def __init__(self) -> None:
        if several():
            mesh = Mesh(np.asarray(jax.devices()), ("all",))
            self._split = NamedSharding(mesh, PartitionSpec("all"))
            whole = NamedSharding(mesh, PartitionSpec())
            self._largest = jax.jit(lambda numbers: jnp.max(numbers, axis=0), out_shardings=whole)

    def ask(self, *numbers: int) -> Any:
        """Starts the all-reduce; every process must call this equally often."""
        ours = np.asarray([numbers], np.int32)
        if not several():
            return ours[0]
        shape = (jax.device_count(), len(numbers))
        return self._largest(jax.make_array_from_callback(shape, self._split, lambda _: ours))

    def read(self, asked: Any) -> tuple[int, ...]:
        return tuple(int(number) for number in np.asarray(asked))


class Watch:
    """Exits the process with one line and exit code 5 if it waits too long for others.

    A timer thread does that: Python cannot interrupt a process that is blocked in a collective.
    """

    def __init__(self, timeout: float, message: Callable[[str], str]) -> None:
        """Args: timeout in seconds; message: makes the final line from a description of what was waited for."""
        self._timeout, self._message = timeout, message

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        timer = threading.Timer(self._timeout, self._end, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, what: str) -> None:
        print(f"anyexperts: {self._message(what)}", file=sys.stderr, flush=True)
        os._exit(PeerLostError.exit_code)


# Words in the errors of collectives, barriers and the coordination service after a process died.
_SIGNS = ("Gloo", "Connection closed by peer", "Connection reset by peer", "heartbeat", "Barrier", "barrier", "NCCL")


def peer_lost(error: BaseException) -> str | None:
    """The first line of the message if `error` was caused by the death of another process, else None."""
    if not several() or isinstance(error, UserError):
        return None
    line = (str(error).splitlines() or [""])[0]
    return line[:200] if any(sign in line for sign in _SIGNS) else None

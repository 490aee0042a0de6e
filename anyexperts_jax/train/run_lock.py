"""A lock on the files that a command writes into a run's directory, so that a second command cannot overwrite them.

It is a kernel lock (flock), which ends with its process, however that ends. The lock file says who holds it. Some file
systems do not share such locks between hosts, or do not have them. So the holder also touches the file every few
seconds, and another host takes the lock over only after a minute without a touch.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.files import require_printable
from anyexperts_jax.train.stops import no_room

TOUCH_SECONDS = 10.0
STALE_SECONDS = 60.0  # another host may take the lock over after this long without a touch
_NO_KERNEL_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock, or held it last."""

    command: str
    pid: int
    host: str
    start: str  # local time, for people

    def describe(self) -> str:
        return f"`anyexperts {self.command}`, process {self.pid} on {self.host}, since {self.start}"


@contextlib.contextmanager
def run_lock(root: pathlib.Path, writes: str, command: str | None = None) -> Iterator[None]:
    """Holds the lock ROOT/WRITES.lock. Creates ROOT, and removes it again if it stays empty.

    Args:
      writes: names what is written. Commands that write different files have different locks, so that a run can be
        evaluated while it trains.
      command: the name of the command, for messages; None: same as `writes`.

    Raises:
      UserError: if another process holds the lock (saying which, where and since when), or ROOT cannot be created or
        written.
    """
    require_printable(root, "run directory")
    made = _make(root)
    try:
        path = root / f"{writes}.lock"
        descriptor = _acquire(root, path)
        try:
            owner = Owner(command or writes, os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(dataclasses.asdict(owner)).encode(), 0)
            with _touching(descriptor):
                yield
        finally:
            with contextlib.suppress(OSError):  # the directory may have become read-only or been deleted
                if _is_at(path, descriptor):
                    path.unlink()
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for folder in made:
                folder.rmdir()


def _make(root: pathlib.Path) -> list[pathlib.Path]:
    """Creates the directory and its parents; returns those that did not exist, deepest first."""
    try:
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run directory {root}: {error.strerror}") from error
    return missing


def _acquire(root: pathlib.Path, path: pathlib.Path) -> int:
    """Opens the lock file and locks it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if no_room(error):
                raise
            raise UserError(f"cannot write to the run directory {root}: {error.strerror}") from error
        with contextlib.ExitStack() as closing:
            closing.callback(os.close, descriptor)  # closes the file unless its descriptor is returned
            _take(root, descriptor)
            if _is_at(path, descriptor):
                closing.pop_all()
                return descriptor
            # Its previous holder has deleted it meanwhile, so the locked file is not the one that others would open.


def _take(root: pathlib.Path, descriptor: int) -> None:
    """Locks the open file.

    Raises:
      UserError: if its holder is alive, or is on another host and may be alive.
    """
    kernel = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read_owner(descriptor)
        who = "another process" if holder is None else holder.describe()
        raise UserError(f"{root} is in use by {who}; wait until it is done, or stop it") from None
    except OSError as error:
        if error.errno not in _NO_KERNEL_LOCKS:
            raise
        kernel = False
    holder = _read_owner(descriptor)
    if holder is None:
        return
    if holder.host == socket.gethostname():
        if not kernel and holder.pid != os.getpid() and _lives(holder.pid):
            raise UserError(f"{root} is in use by {holder.describe()}; wait until it is done, or stop it")
        return
    silent = time.time() - os.fstat(descriptor).st_mtime
    if silent < STALE_SECONDS:
        raise UserError(
            f"{root} is in use by {holder.describe()}; this host cannot tell whether that process lives: its last sign "
            f"of life is {max(silent, 0):.0f} s old. If it is gone, run this again in {STALE_SECONDS:.0f} s"
        )


def _read_owner(descriptor: int) -> Owner | None:
    """The owner in the lock file; None if it is empty or not a lock file."""
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process exists, but belongs to another user
    return True


@contextlib.contextmanager
def _touching(descriptor: int) -> Iterator[None]:
    """Updates the file's time every few seconds from a thread."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    thread = threading.Thread(target=touch, name="run_lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

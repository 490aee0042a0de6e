"""The ways in which a run can stop early: each is an exception with a one-line message and an exit code."""

import errno
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from anyexperts_jax.core.errors import one_line


class RunStoppedError(Exception):
    """The run ended early. The command line prints the message and exits with `exit_code`."""

    exit_code = 1
    alone = False  # whether only this process ends and the others do not know of it


class NonFiniteError(RunStoppedError):
    """A loss or gradient is NaN or infinite."""

    exit_code = 3


class DiskFullError(RunStoppedError):
    """Logs or a checkpoint could not be written because the disk is full."""

    exit_code = 4
    alone = True


class PeerLostError(RunStoppedError):
    """Another process of the run died or hangs."""

    exit_code = 5
    alone = True


class RunInterruptedError(RunStoppedError):
    """SIGINT or SIGTERM arrived and a checkpoint was written. The exit code is 130 or 143, as is usual in shells."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequests:
    """A context that records SIGINT and SIGTERM instead of acting on them. A second signal acts as it did outside.

    Only the main thread gets signals; in other threads nothing is recorded.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: a handler not of Python
        self._previous = {}


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException) -> str | None:
    """The system's message if `error` or one of its causes is a full disk, else None.

    Checkpoint writers wrap the system's error, so its text is searched as well as its number.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        for number in _NO_ROOM:
            if getattr(cause, "errno", None) == number or os.strerror(number) in str(cause):
                return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None


def memory_failure(error: BaseException) -> tuple[str, int] | None:
    """The message and exit code for an error that means too little memory; None for any other error."""
    said = (str(error).splitlines() or [""])[0]
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in said:
        return None
    why = f" ({said.strip()})" if said.strip() else ""
    return f"out of memory{why}; make the batch, the sequences or the model smaller", 2


def file_failure(error: OSError | RuntimeError | MemoryError, output: Any = None) -> tuple[str, int] | None:
    """The message and exit code for an error of a file; None for any other error.

    Writers in C++ raise RuntimeError, which is taken for a file's error only if the disk is full.

    Args:
      output: the path that the command writes to. It is named if the disk is full and the error does not name a file.
        Any other error may come from any file, even one that is read, so it is not attributed to this path.
    """
    said = no_room(error)
    if said is not None:
        where = getattr(error, "filename", None) or output or "its output"
        return f"cannot write to {where}: {said}; free some space and run it again", DiskFullError.exit_code
    if isinstance(error, BrokenPipeError):
        return f"cannot write to the standard output: {error.strerror}", 2
    if isinstance(error, OSError):
        if error.filename is None:
            said = error.strerror or one_line(error) or type(error).__name__
            return f"cannot read or write a file: {said}", 2
        return f"cannot read or write {error.filename}: {error.strerror}; give a path where that is possible", 2
    return None

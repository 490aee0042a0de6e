"""Counts rows that cannot be used, by reason, over all threads and worker processes of a run."""

import contextlib
import os
import re
import tempfile
import threading
import uuid
from collections import Counter

from anyexperts_jax.core.errors import UserError

_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


class BadRows:
    """The rows skipped so far. Copies in worker processes write to the same file; the original deletes it."""

    def __init__(self, most_share: float) -> None:
        path = os.path.join(tempfile.gettempdir(), f"anyexperts-skipped-{uuid.uuid4().hex}")
        self._start(most_share, path, os.getpid())

    def _start(self, most_share: float, path: str, owner: int) -> None:
        self._most_share, self._path, self._owner = most_share, path, owner
        self._lock, self._reached = threading.Lock(), 0
        self._reasons: dict[str, dict[str, str]] = {}  # by source and row

    def __getstate__(self) -> tuple[float, str]:
        return self._most_share, self._path

    def __setstate__(self, state: tuple[float, str]) -> None:
        self._start(*state, owner=-1)

    def close(self) -> None:
        """Deletes the file."""
        if self._owner == os.getpid():
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def add(self, name: str, row: int, rows: int, error: UserError) -> None:
        """Counts one row of the `rows` that a source has.

        Raises:
          UserError: if more than the allowed share cannot be used, with the message of the last one.
        """
        with self._lock:
            if str(row) not in self._reasons.get(name, {}):
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(f"{name}\t{row}\t{reason_of(error)}\n")
                self._catch_up()
            bad = len(self._reasons.get(name, {}))
        if bad > self._most_share * rows:
            raise UserError(
                f"{bad} of the {rows} rows of {name} cannot be used, more than data.max_bad_share={self._most_share:g}"
                f"; the last: {error}"
            ) from error

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns how many rows were skipped, as {source: {reason: rows}}, most frequent first."""
        with self._lock:
            self._catch_up()
            return {name: dict(Counter(rows.values()).most_common()) for name, rows in self._reasons.items()}

    def _catch_up(self) -> None:
        """Reads what all processes have written since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._reached)
                data = file.read()
        except FileNotFoundError:  # nothing was skipped yet
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._reached += len(whole)
        for line in whole.decode("utf-8").splitlines():
            name, row, reason = line.split("\t", 2)
            self._reasons.setdefault(name, {})[row] = reason


def reason_of(error: UserError) -> str:
    """Removes file, row, names and numbers from an error, so that equal faults are counted together."""
    text = getattr(error, "reason", str(error))
    return _NUMBER.sub("N", _QUOTED.sub("'...'", " ".join(text.split())))[:160]


def describe_skipped(counts: dict[str, dict[str, int]]) -> list[str]:
    """Returns a line per source with the number of skipped rows and the reasons."""
    return [
        f"{name}: skipped {sum(reasons.values())} rows: "
        + "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        for name, reasons in counts.items()
    ]

"""`Rows`, the records of one place by index; `RowError`; and `RowFormat`, a kind of files with rows."""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import UInt64
from numpy import ndarray

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.sources.places import File, Place


class RowError(UserError):
    """A row that cannot be used, with its file, its place there, and a reason that names neither."""

    def __init__(self, file: str, row: str, reason: str) -> None:
        super().__init__(f"{file} {row}: {reason}" if row else f"{file}: {reason}")
        self.file, self.row, self.reason = file, row, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return RowError, (self.file, self.row, self.reason)


@runtime_checkable
class Rows(Protocol):
    """The records at a place, in a fixed order. Reading one does not read others. Picklable and thread-safe."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content of all rows."""
        ...

    @property
    def labels(self) -> Mapping[str, Sequence[str]]:
        """The names of class labels, by column."""
        ...

    @property
    def digests_N(self) -> UInt64[ndarray, " N"]:
        """A hash of each row's content."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Returns the record's values by column.

        Raises:
          UserError: with only the reason; `where` gives the place.
        """
        ...

    def where(self, index: int) -> tuple[str, str]:
        """Returns the file of a row, and the usual name of its place there: "line 12"."""
        ...

    @property
    def file_sizes(self) -> list[tuple[str, int]]:
        """(path relative to the place, number of rows) of each file, in order."""
        ...

    def read(self, index: int, path: str) -> bytes:
        """Reads a file that the record names.

        Raises:
          UserError: if there is no such file.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """A kind of files with rows, an entry of `core.registries.ROW_FORMATS`.

    said: its usual name: "JSON Lines".
    find: returns the files of a place that are of this kind; none: the place is not of this kind.
    open: opens the rows of these files; raises UserError if they cannot be read.
    """

    said: str
    find: Callable[[Place], Sequence[File]]
    open: Callable[[Sequence[File]], Rows]


def by_suffix(*suffixes: str) -> Callable[[Place], Sequence[File]]:
    """Returns a `find` for files whose names end in one of these suffixes, in upper or lower case."""

    def find(place: Place) -> Sequence[File]:
        return [file for file in place.files if file.suffixes.endswith(suffixes)]

    return find


def split_index(bounds: Sequence[int], index: int) -> tuple[int, int]:
    """Returns the part that an index is in, and its index there; `bounds` are the ends of the parts, in order.

    Raises:
      IndexError: past the last.
    """
    part = bisect.bisect_right(bounds, index)
    if index < 0 or part == len(bounds):
        raise IndexError(index)
    return part, index - (bounds[part - 1] if part else 0)

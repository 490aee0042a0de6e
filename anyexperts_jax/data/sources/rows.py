"""`Rows`: the records of one place by number; `RowError`; and the kinds of files they come from."""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import UInt64
from numpy import ndarray

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.sources.places import File, Place


class RowError(UserError):
    """A row that cannot be used: the file, the row in it, and the reason, which names neither."""

    def __init__(self, file: str, row: str, reason: str) -> None:
        super().__init__(f"{file} {row}: {reason}" if row else f"{file}: {reason}")
        self.file, self.row, self.reason = file, row, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return RowError, (self.file, self.row, self.reason)


@runtime_checkable
class Rows(Protocol):
    """The records at a place, in a fixed order. Reading one reads no other. Picklable, and safe in several threads."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the rows hold."""
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
        """The record's values by column.

        Raises:
          UserError: with the reason alone; `where` says which it was.
        """
        ...

    def where(self, index: int) -> tuple[str, str]:
        """The file, and what people call the row in it: "line 12"."""
        ...

    @property
    def file_sizes(self) -> list[tuple[str, int]]:
        """(path relative to the place, number of rows) of each file, in order."""
        ...

    def read(self, index: int, path: str) -> bytes:
        """The bytes of a file that the record names.

        Raises:
          UserError: when there is no such file.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """A kind of file that rows are read from, an entry of `core.registries.ROW_FORMATS`.

    said: what people call it: "JSON Lines".
    find: which of a place's files are of this kind; none: the place is not.
    open: the rows of these files. Raises UserError where they cannot be read.
    """

    said: str
    find: Callable[[Place], Sequence[File]]
    open: Callable[[Sequence[File]], Rows]


def by_suffix(*suffixes: str) -> Callable[[Place], Sequence[File]]:
    """Finds the files whose names end in one of these suffixes, in upper or lower case."""

    def find(place: Place) -> Sequence[File]:
        return [file for file in place.files if file.suffixes.endswith(suffixes)]

    return find


def split_index(bounds: Sequence[int], index: int) -> tuple[int, int]:
    """Which part a number falls into, and its number there; `bounds` are where the parts end, in order.

    Raises:
      IndexError: past the last.
    """
    part = bisect.bisect_right(bounds, index)
    if index < 0 or part == len(bounds):
        raise IndexError(index)
    return part, index - (bounds[part - 1] if part else 0)

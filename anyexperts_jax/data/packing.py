"""Packs several sequences into one row by streaming first fit into a window of open rows."""

from collections.abc import Iterable, Iterator
from typing import Any

import grain
import numpy as np

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.data.sequence import EncodedSequence, Size, concatenate


class OpenRows:
    """At most `window` rows that are being filled; each sequence goes to the first row that has room for it."""

    def __init__(self, room: Size, window: int) -> None:
        self._room, self._window = room, window
        self._rows: list[list[EncodedSequence]] = []
        self._sizes: list[Size] = []

    def add(self, sequence: EncodedSequence) -> bool:
        """Adds a sequence; returns False, without adding it, if no row has room and `window` rows are open."""
        for i, size in enumerate(self._sizes):
            if (size + sequence.size).fits(self._room):
                self._rows[i].append(sequence)
                self._sizes[i] = size + sequence.size
                return True
        if len(self._rows) == self._window:
            return False
        self._rows.append([sequence])
        self._sizes.append(sequence.size)
        return True

    def close(self) -> list[EncodedSequence]:
        """Closes all rows and returns them, each as one sequence, in the order in which they were opened."""
        rows, self._rows, self._sizes = self._rows, [], []
        return [concatenate(row) for row in rows]


def pack(sequences: Iterable[EncodedSequence], room: Size, window: int = 64) -> Iterator[EncodedSequence]:
    """Packs sequences into rows no larger than `room`, each sequence whole and as its own segment.

    Each sequence goes to the first of `window` open rows that has room. If none has, all rows are yielded, and the
    sequence opens the next one. A wider window leaves less padding and needs more memory. A sequence larger than `room`
    gets its own row, which `padded` then refuses.
    """
    rows = OpenRows(room, window)
    for sequence in sequences:
        if not rows.add(sequence):
            yield from rows.close()
            rows.add(sequence)
    yield from rows.close()


class PackedSequences(grain.IterDataset):
    """`pack` as a Grain dataset, whose iterators can be saved and resumed at any row."""

    def __init__(self, sequences: grain.IterDataset, room: Size, window: int) -> None:
        super().__init__(sequences)
        self._room, self._window = room, window

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(iter(self._parent), OpenRows(self._room, self._window))


class _PackedIterator(grain.DatasetIterator):
    """The iterator of `PackedSequences`.

    Its state is the parent's before the current rows were filled, and how many of these rows were yielded; resuming
    fills them again. So the state does not depend on the content of the rows, and is as small as the parent's.
    """

    def __init__(self, sequences: grain.DatasetIterator, rows: OpenRows) -> None:
        super().__init__(sequences)
        self._open = rows
        self._restart(sequences.get_state(), 0)

    def _restart(self, filled_from: Any, given: int) -> None:
        self._filled_from, self._given = filled_from, given
        self._next_from: Any = None  # the parent's state before `_left_over`
        self._left_over: EncodedSequence | None = None
        self._rows: list[EncodedSequence] | None = None

    def get_state(self) -> dict[str, Any]:
        return {"sequences": self._filled_from, "rows": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["sequences"])
        self._open.close()
        self._restart(state["sequences"], state["rows"])

    def __next__(self) -> EncodedSequence:
        if self._rows is None:
            self._rows = self._fill()
        row = self._rows[self._given]
        self._given += 1
        if self._given == len(self._rows):
            self._rows, self._filled_from, self._given = None, self._next_from, 0
        return row

    def _fill(self) -> list[EncodedSequence]:
        if self._left_over is not None:
            self._open.add(self._left_over)
        for sequence in iter(self._read, None):
            if not self._open.add(sequence):
                break
        rows = self._open.close()
        if not rows:
            raise StopIteration
        return rows

    def _read(self) -> EncodedSequence | None:
        """Returns the parent's next sequence, which stays pending until it is added; None at the end."""
        self._next_from = self._parent.get_state()
        self._left_over = next(self._parent, None)
        return self._left_over


def padding_shares(batch: Batch, segments: int = 1) -> tuple[float, float]:
    """Returns (share of padding with one example per row, actual share of padding).

    Args:
      segments: segments of an example; a preference has 2.
    """
    valid_BT, segment_BT = np.asarray(batch.valid_BT), np.asarray(batch.segment_BT)
    examples = np.where(valid_BT, segment_BT + 1, 0).max(axis=1).sum() // segments
    length = valid_BT.shape[1]
    return 1 - float(valid_BT.sum() / max(examples * length, 1)), 1 - float(valid_BT.mean())

"""`RowSource`: one split of a user's rows, as examples, conversations and windows of documents."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.data.cells import text_of
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.conversation import Document, Item
from anyexperts_jax.data.domain import SPLITS, Metric
from anyexperts_jax.data.records import Reading, read_record
from anyexperts_jax.data.sources.cache import Numbers, hash_64, made_once
from anyexperts_jax.data.sources.places import StoreError
from anyexperts_jax.data.sources.rows import RowError, Rows
from anyexperts_jax.data.turns import uses_template
from anyexperts_jax.data.windows import cut
from anyexperts_jax.tokenizers.base import Tokenizer

_NAMED = re.compile(r"(?:^|[^a-z])(train|training|validation|valid|val|dev|test|eval)(?![a-z])")
_SPLIT_OF = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2, "eval": 2}
_HELD_OUT_BASE = 2**64


class RowSource:
    """The examples of one split of a user's rows, a `data.source.Source` that also knows the place of each example.

    Attributes:
      question_types: the kinds of question in all splits, sorted by name.
      metric: the metric by which answers are scored.
      fingerprint: hash of the rows of all splits.
      held_out: whether the split was made by hash because the data do not name it.

    Raises:
      UserError: if the split is empty, or its first row cannot be read.
    """

    def __init__(self, name: str, rows: Rows, split: str, config: DataConfig, tokenizer: Tokenizer) -> None:
        require(len(rows) > 0, f"{name}: there are no rows in the data")
        self.rows, self._name, self._config, self._tokenizer = rows, name, config, tokenizer
        self._chat = uses_template(config, tokenizer)
        splits = _Splits(rows, config)
        self.fingerprint, self.held_out = rows.fingerprint, splits.held_out(split)
        self.rows_N = splits.rows_of(split)
        require(len(self.rows_N) > 0, splits.why_empty(name, split))
        if split != "train":  # an evaluation uses the first examples, and files are often sorted by content
            self.rows_N = np.random.default_rng(int(rows.fingerprint, 16)).permutation(self.rows_N)
        first = self._first()
        self.question_types = self._types(first)
        self.is_corpus = isinstance(first, Document)
        self.metric: Metric = "tokens" if self.is_corpus else "wer" if _is_transcript(first) else "exact"
        self._windows = self._cut(split) if self.is_corpus else None

    def __len__(self) -> int:
        return len(self.rows_N if self._windows is None else self._windows)

    def __getitem__(self, index: int) -> Item:
        """Returns the example.

        Raises:
          RowError: if the row cannot be used.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._windows is None:
            return self._item(int(self.rows_N[index]))
        row, start, stop, ends = self._windows.array_N[index].tolist()
        item = self._item(row)
        if isinstance(item, Document) and stop >= 0:
            return dataclasses.replace(item, text=item.text[start:stop], ends=bool(ends))
        return item

    def where(self, index: int) -> tuple[str, str]:
        """Returns the file of an example, and its row in the file."""
        row = int(self.rows_N[index] if self._windows is None else self._windows.array_N[index][0])
        return self.rows.where(row)

    def whole(self, index: int) -> Item | None:
        """Returns the row's whole document if this is its first window; None for a later one.

        Raises:
          RowError: if the row cannot be used.
        """
        if self._windows is None:
            return self[index]
        row, start, _, _ = self._windows.array_N[index].tolist()
        return self._item(row) if start == 0 else None

    def rows_cut(self) -> int:
        """Returns the number of documents that are cut into several windows."""
        return 0 if self._windows is None else int((np.bincount(self._windows.array_N[:, 0]) > 1).sum())

    def __iter__(self) -> Iterator[tuple[str, str, Item | RowError]]:
        """Yields (file, row, item or the error that makes it unusable) for each example, in order."""
        for index in range(len(self)):
            file, row = self.where(index)
            try:
                yield file, row, self[index]
            except RowError as error:
                yield file, row, error

    def _item(self, row: int) -> Item:
        file, place = self.rows.where(row)

        def read(path: str) -> bytes:
            return self.rows.read(row, path)

        source = f"{file} {place}".strip()
        reading = Reading(self._name, source, read, self._config.columns, self.rows.labels, as_examples=not self._chat)
        try:
            return read_record(self.rows[row], reading)
        except StoreError as error:
            raise StoreError(f"{file} {place}: {error}") from error
        except UserError as error:
            raise error if isinstance(error, RowError) else RowError(file, place, str(error)) from error

    def _first(self) -> Item:
        """Returns the first row of all splits; with data.on_bad_row=skip the first usable one among a hundred."""
        tries = 100 if self._config.on_bad_row == "skip" else 1
        last: UserError | None = None
        for row in range(min(tries, len(self.rows))):
            try:
                return self._item(row)
            except RowError as error:
                last = error
        raise last if last is not None else UserError(f"{self._name} has no rows")

    def _types(self, first: Item) -> tuple[str, ...]:
        """Returns the kinds of question in all rows, read once, if the rows have such a column."""
        column = self._config.columns.question_type
        if first.question_type == "any":
            return ("any",)
        labels = self.rows.labels.get(column)

        def build(folder: pathlib.Path) -> None:
            found = {"any"}
            for row in range(len(self.rows)):
                try:
                    value = self.rows[row].get(column)
                    found.add("any" if value is None else text_of(value, list(labels) if labels else None, column))
                except StoreError:
                    raise
                except UserError:
                    continue  # reported when the row is read as an example
            (folder / "types").write_text("\0".join(sorted(found)), encoding="utf-8")

        folder = made_once(build, "types", self.fingerprint, column)
        return tuple((folder / "types").read_text(encoding="utf-8").split("\0"))

    def _cut(self, split: str) -> Numbers:
        """Returns [windows, 4]: row, first character, end character, and whether the document ends there."""
        spec, config = self._config.encoding, self._config

        def build(folder: pathlib.Path) -> None:
            with open(folder / "windows", "wb") as file:
                for row in self.rows_N.tolist():
                    try:
                        item = self._item(row)
                        pieces = cut(item.text, self._tokenizer, spec.max_length) if isinstance(item, Document) else ()
                    except RowError:
                        pieces = ()  # reported when the row is read as an example
                    ends = len(pieces) - 1
                    whole = [[row, start, stop, i == ends] for i, (start, stop) in enumerate(pieces)]
                    file.write(np.array(whole or [[row, 0, -1, 1]], np.int64).tobytes())

        key = ("shuffled", split, config.held_out, str(config.split_by), config.columns.text, spec.max_length)
        folder = made_once(build, "windows", self.fingerprint, self._tokenizer.fingerprint, *map(str, key))
        return Numbers(folder / "windows", np.int64, 4)


class _Splits:
    """Assigns rows to splits by the names of files and folders, or by hash if no name does."""

    def __init__(self, rows: Rows, config: DataConfig) -> None:
        self._rows, self._config = rows, config
        self._named = [_named_split(name) for name, _ in rows.file_sizes]
        self._has = set(self._named) - {-1}
        if self._has == {0}:
            self._has = set()  # naming only train does not name anything held out

    def held_out(self, split: str) -> bool:
        return SPLITS.index(split) not in self._has

    def rows_of(self, split: str) -> np.ndarray:
        """Returns the indices of its rows, in order."""
        wanted = SPLITS.index(split)
        named_N = np.repeat(np.array(self._named, np.int8), [count for _, count in self._rows.file_sizes])
        if wanted in self._has and wanted > 0:
            return np.flatnonzero(named_N == wanted)
        pool_N = named_N <= 0 if self._has else np.ones(len(named_N), bool)
        if self._has >= {1, 2}:
            return np.flatnonzero(pool_N)
        hashed_N = hashed_splits(self._keys(), self._config.held_out)
        for split_number in self._has - {0}:  # rows of a named split are not held out from another one
            hashed_N = np.where(hashed_N == split_number, 0, hashed_N)
        return np.flatnonzero(pool_N & (hashed_N == wanted))

    def why_empty(self, name: str, split: str) -> str:
        if not self.held_out(split):
            return f"{name}: no row is of split {split!r}, though files are named for it"
        held = self._config.held_out
        by = "the whole row" if self._config.split_by is None else f"column {self._config.split_by!r}"
        return (
            f"{name}: split {split!r} is empty: {held:.0%} of {len(self._rows)} rows, held out by {by}, are none; "
            f"set data.held_out higher, or name files {split}"
        )

    def _keys(self) -> np.ndarray:
        """Returns a hash of each row: of the column in data.split_by, or of the whole row."""
        column = self._config.split_by
        if column is None:
            return self._rows.digests_N

        def build(folder: pathlib.Path) -> None:
            with open(folder / "keys", "wb") as file:
                for index in range(len(self._rows)):
                    file.write(_key(self._rows, index, column).to_bytes(8, "little"))

        keys = Numbers(made_once(build, "keys", self._rows.fingerprint, column) / "keys", np.uint64)
        return keys.array_N


def hashed_splits(keys_N: UInt64[ndarray, " N"], held: float) -> Int[ndarray, " N"]:
    """Assigns each row by its hash: test (2) below `held` of all hashes, validation (1) below twice that.

    Rows with equal hashes are in one split. With three or more hashes every split gets at least one: the lowest is in
    test, the next in validation. Once each held-out split has some twenty rows, adding rows moves none between splits.
    """
    shares_N = keys_N / np.float64(_HELD_OUT_BASE)
    splits_N = np.where(shares_N < held, 2, np.where(shares_N < 2 * held, 1, 0))
    if np.bincount(splits_N, minlength=3).all():
        return splits_N
    # Few rows: the lowest of the sorted hashes are taken.
    values, group_N = np.unique(keys_N, return_inverse=True)
    if len(values) < 3:
        return np.zeros(len(keys_N), np.int64)
    share = values.astype(np.float64) / _HELD_OUT_BASE
    tests = max(1, int((share < held).sum()))
    validations = max(1, int(((held <= share) & (share < 2 * held)).sum()))
    validations = min(validations, len(values) - tests - 1)
    splits = np.zeros(len(values), np.int64)
    splits[:tests], splits[tests : tests + validations] = 2, 1
    return splits[group_N]


def _key(rows: Rows, index: int, column: str) -> int:
    try:
        row = rows[index]
    except StoreError:
        raise
    except UserError:
        return 2**64 - 1  # puts the row into train, where it is reported or skipped
    if column not in row:
        file, place = rows.where(index)
        raise RowError(file, place, f"no column {column!r} (data.split_by); its columns are {comma_list(row)}")
    return hash_64(repr(row[column]).encode())


def _named_split(name: str) -> int:
    """Returns the split that a file's path names, innermost part first; -1: none."""
    for part in reversed(name.lower().split("/")):
        found = _NAMED.search(part)
        if found:
            return _SPLIT_OF[found[1]]
    return -1


def _is_transcript(item: Item) -> bool:
    """Whether the item is a sound with a transcript and no question."""
    messages: Any = getattr(item, "messages", ())
    kinds = [getattr(part, "kind", "text") for message in messages[:1] for part in message.parts]
    return len(messages) == 2 and kinds == ["audio"]

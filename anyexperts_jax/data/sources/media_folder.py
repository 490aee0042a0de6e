"""Rows of folders with recordings, pictures or films, whose texts are in a table or in .txt files beside them.

A table is named transcripts or metadata, with the suffix .tsv, .csv or .jsonl. Its column `file` (or file_name, path,
audio, image, video) names a file relative to the table's folder, and its other columns belong to the row. Without a
table, the text of a file is in the .txt file of the same name.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.core.files import parse_json_object
from anyexperts_jax.data.sources.cache import fingerprint, hash_64
from anyexperts_jax.data.sources.places import File, Place, beside, read_file
from anyexperts_jax.data.sources.rows import RowFormat
from anyexperts_jax.data.sources.webdataset import KIND_OF

_TABLES = tuple(f"{name}.{kind}" for name in ("transcripts", "metadata") for kind in ("tsv", "csv", "jsonl"))
_FILE_COLUMNS = ("file", "file_name", "path", "audio", "image", "video")
# beside such files, media belong to the rows of these files
_OTHERS = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json", ".parquet"),
    *(".array_record", ".tar", ".tar.gz", ".tgz", ".tar.zst"),
)
_TEXT_COLUMNS = ("transcript", "transcription", "sentence", "caption")


class MediaRows:
    """A row for each file that a table names, or that has a .txt beside it. Tables are kept in memory.

    Raises:
      UserError: if a table is malformed, or no recording has a text.
    """

    labels: Mapping[str, Sequence[str]] = {}

    def __init__(self, files: Sequence[File]) -> None:
        self._files = tuple(files)
        sizes = {file.path: file.size for file in files}
        tables = [file for file in files if _base(file) in _TABLES]
        self._rows: list[tuple[str, str, str, dict[str, Any]]] = []  # table, row in it, medium's path, columns
        self._sizes: list[tuple[str, int]] = []
        for table in tables:
            found = _table_rows(table)
            self._rows += found
            self._sizes.append((table.name, len(found)))
        if not tables:
            self._rows, self._sizes = _paired(files)
        told = (f"{path}{sorted(row.items())}{sizes.get(path, -1)}" for _, _, path, row in self._rows)
        root = os.path.commonpath([os.path.dirname(file.path) for file in files])
        self.digests_N = np.array([hash_64(one.replace(root, "").encode()) for one in told], np.uint64)
        self.fingerprint = fingerprint(hash_64(self.digests_N.tobytes()))

    def __reduce__(self) -> tuple[Any, ...]:
        return MediaRows, (self._files,)

    @property
    def file_sizes(self) -> list[tuple[str, int]]:
        return self._sizes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        _, _, path, row = self._rows[index]
        kind = KIND_OF.get(path.rpartition(".")[2].lower())
        if kind is None:
            raise UserError(f"{path} is not a picture, sound or film by its name; known: {comma_list(KIND_OF)}")
        values = dict(row)
        if not row.get("text") and not row.get("answer"):
            other = next((name for name in _TEXT_COLUMNS if row.get(name)), None)
            if other is not None:
                values["text"] = values.pop(other)
        if "text" not in values and "answer" not in values and not row:
            values["text"] = _text_file(path)
        return {**values, kind: path}

    def where(self, index: int) -> tuple[str, str]:
        table, place, _, _ = self._rows[index]
        return table, place

    def read(self, index: int, path: str) -> bytes:
        return read_file(path if path == self._rows[index][2] else beside(self._rows[index][0], path))


def _table_rows(table: File) -> list[tuple[str, str, str, dict[str, Any]]]:
    try:
        text = read_file(table.path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{table.path} is not UTF-8 text (byte {error.start})") from error
    if table.path.endswith(".jsonl"):
        lines = [(i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
        rows = [(i, parse_json_object(line, f"{table.path} line {i}")) for i, line in lines]
    else:
        reader = csv.DictReader(io.StringIO(text), delimiter="\t" if table.path.endswith(".tsv") else ",", strict=True)
        try:
            rows = [(reader.line_num, {str(key): value for key, value in row.items()}) for row in reader]
        except csv.Error as error:
            raise UserError(f"{table.path} line {reader.line_num}: {error}") from error
    found = []
    for number, row in rows:
        where = f"{table.path} line {number}"
        column = next((name for name in _FILE_COLUMNS if row.get(name)), None)
        require(
            column is not None,
            f"{where}: no column with the file ({comma_list(_FILE_COLUMNS)}), only {comma_list(row)}",
        )
        more = {key: value for key, value in row.items() if key != column}
        require("None" not in more, f"{where}: more values than the table has columns")
        found.append((table.path, f"line {number}", beside(table.path, str(row[str(column)])), more))
    return found


def _paired(files: Sequence[File]) -> tuple[list[tuple[str, str, str, dict[str, Any]]], list[tuple[str, int]]]:
    """Returns each medium that has a text beside it, as a row and as a file with one row."""
    texts = {os.path.splitext(file.path)[0] for file in files if file.suffixes.endswith(".txt")}
    media = [file for file in files if _kind(file)]
    with_text = [file for file in media if os.path.splitext(file.path)[0] in texts]
    require(
        len(with_text) > 0,
        f"{len(media)} files such as {media[0].path} have no text: put a .txt of the same name beside each, or a table "
        f"transcripts.tsv with the columns file and text",
    )
    return [(file.path, "", file.path, {}) for file in with_text], [(file.name, 1) for file in with_text]


def _text_file(path: str) -> str:
    name = os.path.splitext(path)[0] + ".txt"
    try:
        return read_file(name).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start})") from error


def _base(file: File) -> str:
    return file.name.rpartition("/")[2].lower()


def _kind(file: File) -> str | None:
    return KIND_OF.get(file.suffixes.rpartition(".")[2])


def _find(place: Place) -> Sequence[File]:
    """Returns all files of a folder that has a table, or media and no other kind of rows."""
    if not place.is_folder:
        return ()
    if any(_base(file) in _TABLES for file in place.files):
        return place.files
    has_table = any(file.suffixes.endswith(_OTHERS) for file in place.files)
    return place.files if not has_table and any(_kind(file) for file in place.files) else ()


FORMAT = RowFormat("recordings or pictures with their texts", _find, MediaRows)

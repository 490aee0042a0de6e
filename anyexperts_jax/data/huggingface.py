"""Examples in a Hugging Face dataset written by `save_to_disk`: a `DatasetDict` with the splits as keys.

Columns, of which the first two are required:

| column | holds |
|---|---|
| `question`, `answer` | text; a class label is its name, a number or truth value is written out, a list has one entry |
| `question_type` | text or a class label, the same everywhere if left out; None counts as "any" |
| `level` | 1 to 3; 1 if left out |
| one of `image`, `video`, `audio` | a feature of that kind, a file name (from the dataset's folder), or numbers |

Numbers are pixels [H, W, 3] and [F, H, W, 3], and samples at 16 kHz or {"array": ..., "sampling_rate": 16000}; a video
may be a list of images. `data.decode` decodes all of them; `datasets` itself decodes nothing, so it needs no codec, and
a row that cannot be read is named. Evidence is unknown, so nothing is marked. The package `datasets` is needed.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.data.cells import level_of, text_of
from anyexperts_jax.data.config import Columns
from anyexperts_jax.data.damage import said
from anyexperts_jax.data.decode import decode_audio, decode_picture, decode_video
from anyexperts_jax.data.domain import Metric
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.source import FolderFormat

MARKERS = ("dataset_dict.json",)  # a file that `DatasetDict.save_to_disk` writes
_ONE_TYPE = "any"  # the question type if the dataset names none


def is_folder(folder: pathlib.Path) -> bool:
    """Whether the folder holds a `DatasetDict`."""
    return all((folder / name).is_file() for name in MARKERS)


def holds_other_rows(folder: pathlib.Path, columns: Columns) -> bool:
    """Whether the folder's rows are chats or documents and not questions, or have columns with other names."""
    if not is_folder(folder):
        return False
    if columns != Columns():
        return True
    for path in sorted(folder.glob("*/dataset_info.json")):
        features = _read_json(path).get("features")
        names = set(features) if isinstance(features, dict) else set()
        return bool(names & {"messages", "conversations", "text"}) and not {"question", "answer"} <= names
    return False


class HuggingFaceSource:
    """The examples of one split, scored by exact match.

    Raises:
      UserError: if `datasets` is not installed, or the folder is damaged, lacks the split or a column, or the split has
        no rows.
    """

    metric: Metric = "exact"

    def __init__(self, folder: pathlib.Path, split: str) -> None:
        names = _split_names(folder)
        require(split in names, f"{folder} has no split {split!r}; it has {comma_list(names)}")
        loaded = {name: load_saved(folder, name) for name in names if not _is_empty(folder / name)}
        require(split in loaded and len(loaded[split]) > 0, f"{folder} holds no examples of split {split!r}")
        rows = loaded[split]
        for column in ("question", "answer"):
            has = rows.column_names
            require(column in has, f"{folder} has no column {column!r}; its columns are {comma_list(has)}")
        self._question_types = tuple(sorted(set().union(*(_types_in(each, folder) for each in loaded.values()))))
        self._folder, self._split = folder, split
        self._labels = {name: _label_names(rows, name) for name in rows.column_names}
        self._rows = rows.with_format("arrow")  # the stored values; otherwise `datasets` would decode media itself

    @property
    def question_types(self) -> tuple[str, ...]:
        return self._question_types

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        where = f"{self._folder} row {index} of {self._split}"
        row = self._row(index, where)
        texts = {name: text_of(row[name], self._labels[name], f"{where}: {name}") for name in ("question", "answer")}
        fields: dict[str, Any] = {
            **texts,
            "domain": self._folder.name,
            "question_type": _type_name(row.get("question_type"), self._labels.get("question_type"), where),
            "level": level_of(row.get("level"), where),
            "source": f"row:{index}",
            **{name: _media(row[name], name, self._folder, where) for name in _DECODERS if row.get(name) is not None},
        }
        try:
            return Example(**fields)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def _row(self, index: int, where: str) -> dict[str, Any]:
        """Returns the row's values by column, as Python values, with lists of numbers as arrays of their type."""
        import pyarrow

        try:
            return row_values(stored_row(self._rows, index))
        except (ValueError, OSError, pyarrow.ArrowException) as error:
            raise UserError(f"cannot read {where}: {said(error)}") from error


def _split_names(folder: pathlib.Path) -> list[str]:
    path = folder / MARKERS[0]
    names = _read_json(path).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path} does not list the dataset's splits")
    return names


def _is_empty(folder: pathlib.Path) -> bool:
    """Whether a split was saved without rows: it then has no data file, and `datasets` cannot load it."""
    return _read_json(folder / "state.json").get("_data_files") == []


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {said(error)}") from error
    require(isinstance(values, dict), f"{path} is not a JSON object")
    return values


def load_saved(folder: str | pathlib.Path, split: str = "") -> Any:
    """Loads what `datasets` saved in a folder, or one split of it.

    Raises:
      UserError: if `datasets` is not installed, or the folder cannot be read.
    """
    try:
        import pyarrow
        from datasets import load_from_disk
    except ImportError as error:
        raise UserError(f"{folder} is a Hugging Face dataset: pip install datasets to read it") from error
    path = pathlib.Path(folder) / split
    try:
        return load_from_disk(str(path))
    except (ValueError, OSError, LookupError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read the Hugging Face dataset {path}: {said(error)}") from error


def _label_names(rows: Any, column: str) -> list[str] | None:
    """Returns the names of a column's class labels, or of its lists of labels; None for other columns."""
    feature = rows.features[column]
    return getattr(getattr(feature, "feature", feature), "names", None)


def _types_in(rows: Any, folder: pathlib.Path) -> set[str]:
    """Returns the question types of a split's rows."""
    import pyarrow

    column = "question_type"
    if column not in rows.column_names:
        return {_ONE_TYPE}
    kind = rows.features[column]
    try:
        rows.data.column(column).validate(full=True)
        values = rows.unique(column)
    except pyarrow.ArrowNotImplementedError as error:
        raise UserError(f"{folder}: column {column!r} must hold one name a row, not {kind}") from error
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {folder}, column {column!r}: {said(error)}") from error
    return {_type_name(value, _label_names(rows, column), str(folder)) for value in values}


def _type_name(value: Any, labels: list[str] | None, where: str) -> str:
    return _ONE_TYPE if value is None or value == "" else text_of(value, labels, f"{where}: question_type")


_DECODERS = {"image": decode_picture, "video": decode_video, "audio": decode_audio}


def _media(value: Any, kind: str, folder: pathlib.Path, where: str) -> np.ndarray:
    """Decodes a picture, film or sound from a cell."""
    if kind == "audio" and isinstance(value, Mapping) and value.get("array") is not None:
        return decode_audio(value["array"], where, value.get("sampling_rate"))
    if kind == "video" and isinstance(value, list):
        value = [_file(one, folder, where) for one in value]
    return _DECODERS[kind](_file(value, folder, where), where)


def _file(value: Any, folder: pathlib.Path, where: str) -> Any:
    """Returns the bytes or path of the file that a value stands for; any other value unchanged."""
    if isinstance(value, Mapping):
        known = value.get("bytes") is not None or value.get("path") is not None
        require(known, f"{where}: media with fields {comma_list(value)} hold neither bytes nor a path")
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str):
        return value
    beside = folder / value
    path = beside if beside.is_file() else pathlib.Path(value)
    require(path.is_file(), f"{where}: there is no file {value!r}, from {folder} or from here")
    return path


def stored_row(rows: Any, index: int) -> Any:
    """Returns a row of a dataset as a table, read from the storage: three times as fast as with `datasets` itself.

    Raises:
      IndexError: past the last row.
    """
    if rows._indices is not None:  # the rows were reordered
        return rows[index]
    if not 0 <= index < len(rows):
        raise IndexError(index)
    return rows.data.fast_slice(index, 1)


def row_values(row: Any) -> dict[str, Any]:
    """Returns the values of a one-row table or batch by column, with lists of numbers as arrays of their type.

    Raises:
      pyarrow.ArrowException, ValueError: if it is damaged.
    """
    row.validate(full=True)  # damaged offsets would lead outside of the file
    return {name: _value(row.column(i)) for i, name in enumerate(row.schema.names)}


def _value(column: Any) -> Any:
    """Returns the value of a one-row column."""
    value = column[0].as_py()
    if value is None or isinstance(value, str | bytes | bool):
        return value
    import pyarrow

    kind = column.type
    if pyarrow.types.is_struct(kind):
        return {kind.field(i).name: _value(part) for i, part in enumerate(_parts(column))}
    if pyarrow.types.is_floating(kind):
        return kind.to_pandas_dtype()(value)  # so that 0.1 in float32 reads "0.1"
    leaf = kind.storage_type if isinstance(kind, pyarrow.BaseExtensionType) else kind
    nested = leaf is not kind
    while pyarrow.types.is_list(leaf) or pyarrow.types.is_large_list(leaf) or pyarrow.types.is_fixed_size_list(leaf):
        leaf, nested = leaf.value_type, True
    numeric = pyarrow.types.is_integer(leaf) or pyarrow.types.is_floating(leaf) or pyarrow.types.is_boolean(leaf)
    if not (nested and numeric):
        return value
    return _typed(value, leaf.to_pandas_dtype())


def _parts(column: Any) -> list[Any]:
    import pyarrow

    if isinstance(column, pyarrow.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    found: list[Any] = column.flatten()
    return found


def _typed(value: Any, dtype: Any) -> Any:
    """Converts nested lists to an array of their type; unchanged if one is missing or lengths differ."""
    try:
        return np.asarray(value, dtype)
    except (ValueError, TypeError):
        return value


FORMAT = FolderFormat(" or ".join(MARKERS), is_folder, HuggingFaceSource)

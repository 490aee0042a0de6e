"""Rows of Parquet files.

A row group can only be read as a whole. So the files are copied into the cache once, in small batches that are read one
at a time, and memory does not grow with the corpus.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.data.huggingface import row_values
from anyexperts_jax.data.sources.cache import Numbers, fingerprint, hash_64, made_once
from anyexperts_jax.data.sources.lines import OpenFiles
from anyexperts_jax.data.sources.places import File, beside, open_file, read_file
from anyexperts_jax.data.sources.rows import RowFormat, by_suffix, split_index

BATCH = 16  # rows that are written, and so read, together
BATCH_BYTES = 1 << 16  # largest size of such a batch; larger rows are written one by one
_BUFFER = 1 << 20  # bytes of a column that are read ahead, instead of a whole row group


class ParquetRows:
    """The rows of Parquet files, one after the other.

    Raises:
      UserError: if pyarrow is missing, or a file is damaged or not a Parquet file.
    """

    def __init__(self, files: Sequence[File]) -> None:
        _pyarrow(files[0].path)
        self._files = tuple(files)
        self._folders = [
            made_once(lambda folder, file=file: _copy(file, folder), "parquet rows", *file.key) for file in files
        ]
        self._digests = [Numbers(folder / "digests", np.uint64) for folder in self._folders]
        self._bounds = np.cumsum([len(digests) for digests in self._digests]).tolist()
        self._places = [Numbers(folder / "places", np.int64, 3) for folder in self._folders]
        self.fingerprint = fingerprint(*(hash_64(digests.array_N.tobytes()) for digests in self._digests))
        self._open = OpenFiles([str(folder / "rows") for folder in self._folders])
        self._schemas = [_read_schema(folder) for folder in self._folders]
        names = {tuple(schema.names) for schema in self._schemas}
        require(len(names) == 1, f"{files[0].path} and files beside it differ in their columns: {sorted(names)[:2]}")
        self.labels = _labels(self._schemas[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetRows, (self._files,)

    @property
    def digests_N(self) -> np.ndarray:
        return np.concatenate([digests.array_N for digests in self._digests])

    @property
    def file_sizes(self) -> list[tuple[str, int]]:
        return [(file.name, len(digests)) for file, digests in zip(self._files, self._digests, strict=True)]

    def __len__(self) -> int:
        return self._bounds[-1]

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        import pyarrow

        part, number = split_index(self._bounds, index)
        begin, size, place = self._places[part].array_N[number].tolist()
        data = pyarrow.py_buffer(self._open.read(part, begin, size))
        try:
            batch = pyarrow.ipc.read_record_batch(data, self._schemas[part]).slice(place, 1)
            return row_values(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot be read: {one_line(error, 160)}") from error

    def where(self, index: int) -> tuple[str, str]:
        part, number = split_index(self._bounds, index)
        return self._files[part].path, f"row {number}"

    def read(self, index: int, path: str) -> bytes:
        return read_file(beside(self._files[split_index(self._bounds, index)[0]].path, path))


def _copy(file: File, folder: pathlib.Path) -> None:
    """Writes the rows in small batches, and for each row the offset of its batch, its index there, and a hash."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(file.path) as raw:
            source = pyarrow.parquet.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False)
            schema = _plain(source.schema_arrow)
            (folder / "schema").write_bytes(schema.serialize().to_pybytes())
            with (
                open(folder / "rows", "wb") as rows,
                open(folder / "places", "wb") as places,
                open(folder / "digests", "wb") as digests,
            ):
                for batch in source.iter_batches(batch_size=BATCH):
                    for part in _small(batch.cast(schema)):
                        written = part.serialize().to_pybytes()
                        for row in range(part.num_rows):
                            places.write(np.array([rows.tell(), len(written), row], np.int64).tobytes())
                            digests.write(row_digest(part.slice(row, 1)).to_bytes(8, "little"))
                        rows.write(written)
    except (pyarrow.ArrowException, OSError) as error:
        said = one_line(error, 160)
        raise UserError(f"{file.path} is not a Parquet file, or is damaged: {said}") from error


def _small(batch: Any) -> list[Any]:
    """Returns the batch, or its rows one by one if they are large."""
    if batch.nbytes <= BATCH_BYTES:
        return [batch]
    return [batch.slice(row, 1) for row in range(batch.num_rows)]


def _read_schema(folder: pathlib.Path) -> Any:
    import pyarrow

    return pyarrow.ipc.read_schema(pyarrow.py_buffer((folder / "schema").read_bytes()))


def _plain(schema: Any) -> Any:
    """Returns the schema without dictionaries, of which a file of batches can have only one."""
    import pyarrow

    fields = [
        field.with_type(field.type.value_type) if pyarrow.types.is_dictionary(field.type) else field for field in schema
    ]
    return pyarrow.schema(fields, metadata=schema.metadata)


def row_digest(row: Any) -> int:
    """Returns a hash of a batch of one row."""
    return hash_64(row.serialize().to_pybytes())


def _labels(schema: Any) -> dict[str, list[str]]:
    """Returns the names of class labels, which `datasets` writes into a file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: list(one["names"]) for name, one in features.items() if "names" in one}
    except (KeyError, ValueError, TypeError):
        return {}


def _pyarrow(path: str) -> None:
    require_package("pyarrow", "datasets", f"{path}: reading Parquet files needs")


FORMAT = RowFormat("Parquet", by_suffix(".parquet"), ParquetRows)

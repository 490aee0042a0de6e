"""Parquet files. A row group is read whole or not at all, so they are copied into the cache once, in small batches
that are mapped into memory from there."""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.data.huggingface import row_values
from anyexperts_jax.data.sources.cache import Numbers, fingerprint, hash_64, made_once
from anyexperts_jax.data.sources.places import File, beside, open_file, read_file
from anyexperts_jax.data.sources.rows import RowFormat, by_suffix, split_index

BATCH = 16  # rows that are read together


class ParquetRows:
    """The rows of Parquet files, one after the other.

    Raises:
      UserError: when pyarrow is missing, or a file is none of Parquet or damaged.
    """

    def __init__(self, files: Sequence[File]) -> None:
        _pyarrow(files[0].path)
        self._files = tuple(files)
        self._folders = [
            made_once(lambda folder, file=file: _copy(file, folder), "parquet", *file.key) for file in files
        ]
        self._digests = [Numbers(folder / "digests", np.uint64) for folder in self._folders]
        self._bounds = np.cumsum([len(digests) for digests in self._digests]).tolist()
        self.fingerprint = fingerprint(*(hash_64(digests.array_N.tobytes()) for digests in self._digests))
        self._open: dict[int, Any] = {}
        names = {tuple(self._reader(part).schema.names) for part in range(len(files))}
        require(len(names) == 1, f"{files[0].path} and files beside it differ in their columns: {sorted(names)[:2]}")
        self.labels = _labels(self._reader(0).schema)

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
        try:
            batch = self._reader(part).get_batch(number // BATCH).slice(number % BATCH, 1)
            return row_values(pyarrow.Table.from_batches([batch]))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot be read: {one_line(error, 160)}") from error

    def where(self, index: int) -> tuple[str, str]:
        part, number = split_index(self._bounds, index)
        return self._files[part].path, f"row {number}"

    def read(self, index: int, path: str) -> bytes:
        return read_file(beside(self._files[split_index(self._bounds, index)[0]].path, path))

    def _reader(self, part: int) -> Any:
        """The batches of a file. Two threads may both open it; one is kept."""
        import pyarrow

        if part not in self._open:
            mapped = pyarrow.memory_map(str(self._folders[part] / "rows.arrow"))
            self._open[part] = pyarrow.ipc.open_file(mapped)
        return self._open[part]


def _copy(file: File, folder: pathlib.Path) -> None:
    """Writes the rows in small batches, and a hash of each."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(file.path) as raw:
            source = pyarrow.parquet.ParquetFile(raw)
            schema = _plain(source.schema_arrow)
            with (
                pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as sink,
                pyarrow.ipc.new_file(sink, schema) as writer,
                open(folder / "digests", "wb") as digests,
            ):
                for batch in _equal_batches(source.iter_batches(batch_size=BATCH), schema):
                    for row in range(batch.num_rows):
                        digests.write(row_digest(batch.slice(row, 1)).to_bytes(8, "little"))
                    writer.write_batch(batch)
    except (pyarrow.ArrowException, OSError) as error:
        said = one_line(error, 160)
        raise UserError(f"{file.path} is no Parquet file, or is damaged: {said}") from error


def _equal_batches(batches: Iterator[Any], schema: Any) -> Iterator[Any]:
    """The same rows in batches of BATCH, but for the last; row groups end where they like."""
    import pyarrow

    left = pyarrow.Table.from_batches([], schema)
    for batch in batches:
        left = pyarrow.concat_tables([left, pyarrow.Table.from_batches([batch]).cast(schema)])
        while left.num_rows >= BATCH:
            yield from left.slice(0, BATCH).combine_chunks().to_batches()
            left = left.slice(BATCH)
    yield from left.combine_chunks().to_batches()


def _plain(schema: Any) -> Any:
    """The schema without dictionaries, which a file of batches can have only one of."""
    import pyarrow

    fields = [
        field.with_type(field.type.value_type) if pyarrow.types.is_dictionary(field.type) else field for field in schema
    ]
    return pyarrow.schema(fields, metadata=schema.metadata)


def row_digest(row: Any) -> int:
    """A hash of a batch of one row."""
    return hash_64(row.serialize().to_pybytes())


def _labels(schema: Any) -> dict[str, list[str]]:
    """Names of class labels, which `datasets` writes into a file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: list(one["names"]) for name, one in features.items() if "names" in one}
    except (KeyError, ValueError, TypeError):
        return {}


def _pyarrow(path: str) -> None:
    try:
        import pyarrow.parquet  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise UserError(f"{path}: pip install pyarrow to read Parquet files (extra `datasets`)") from error


FORMAT = RowFormat("Parquet", by_suffix(".parquet"), ParquetRows)

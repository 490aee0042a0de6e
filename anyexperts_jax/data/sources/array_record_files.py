"""Rows of ArrayRecord files without a manifest; each record is a JSON object."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.core.files import parse_json_object
from anyexperts_jax.data.sources.cache import Numbers, fingerprint, hash_64, made_once
from anyexperts_jax.data.sources.places import File, beside, is_address, read_file
from anyexperts_jax.data.sources.rows import RowFormat, by_suffix, split_index


class ArrayRecordRows:
    """The records of ArrayRecord files, one after the other.

    Raises:
      UserError: if a file is in an object store, or is not an ArrayRecord file.
    """

    labels: Mapping[str, Sequence[str]] = {}

    def __init__(self, files: Sequence[File]) -> None:
        from grain.sources import ArrayRecordDataSource

        far = next((file.path for file in files if is_address(file.path)), None)
        require(far is None, f"{far}: ArrayRecord files are read from this machine alone; copy them")
        self._files = tuple(files)
        try:
            self._records = [ArrayRecordDataSource([file.path]) for file in files]
            self._bounds = np.cumsum([len(records) for records in self._records]).tolist()
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"cannot read {files[0].path} or one beside it: {one_line(error)}") from error
        self.fingerprint = fingerprint(*(f"{file.name} {file.size} {self._tail(file)}" for file in files))

    def _tail(self, file: File) -> int:
        """Returns a hash of the end of a file, which has its index."""
        with open(file.path, "rb") as stream:
            stream.seek(max(file.size - 65536, 0))
            return hash_64(stream.read())

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayRecordRows, (self._files,)

    @property
    def digests_N(self) -> np.ndarray:
        def build(folder: Any) -> None:
            with open(folder / "digests", "wb") as file:
                for records in self._records:
                    for index in range(len(records)):
                        file.write(hash_64(records[index]).to_bytes(8, "little"))

        return Numbers(made_once(build, "array_record", self.fingerprint) / "digests", np.uint64).array_N

    @property
    def file_sizes(self) -> list[tuple[str, int]]:
        return [(file.name, len(records)) for file, records in zip(self._files, self._records, strict=True)]

    def __len__(self) -> int:
        return self._bounds[-1] if self._bounds else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part, number = split_index(self._bounds, index)
        try:
            text = self._records[part][number].decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"the record is not JSON in UTF-8 (byte {error.start})") from error
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"cannot be read: {one_line(error, 160)}") from error
        return parse_json_object(text, "the record")

    def where(self, index: int) -> tuple[str, str]:
        part, number = split_index(self._bounds, index)
        return self._files[part].path, f"record {number}"

    def read(self, index: int, path: str) -> bytes:
        return read_file(beside(self._files[split_index(self._bounds, index)[0]].path, path))


FORMAT = RowFormat("ArrayRecord", by_suffix(".array_record", ".arrayrecord"), ArrayRecordRows)

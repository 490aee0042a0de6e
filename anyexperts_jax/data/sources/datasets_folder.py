"""Rows of folders that the package `datasets` saved, with one dataset or one per split, mapped into memory."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, one_line
from anyexperts_jax.data.huggingface import load_saved, row_values, stored_row
from anyexperts_jax.data.sources.cache import Numbers, fingerprint, made_once
from anyexperts_jax.data.sources.parquet import row_digest
from anyexperts_jax.data.sources.places import File, Place, beside, is_address, read_file
from anyexperts_jax.data.sources.rows import RowFormat, split_index

_ONE, _MANY = "state.json", "dataset_dict.json"


class DatasetRows:
    """The rows of all splits, one after the other; each split counts as a file with its name.

    Raises:
      UserError: if `datasets` is missing or the folder is damaged.
    """

    def __init__(self, files: Sequence[File]) -> None:
        self._files = tuple(files)
        self._folder = os.path.dirname(files[0].path)
        loaded = _load(self._folder)
        self._names = list(loaded)
        self._splits = [one.with_format("arrow") for one in loaded.values()]
        self._bounds = np.cumsum([len(one) for one in self._splits]).tolist()
        self.fingerprint = fingerprint(*(one._fingerprint for one in loaded.values()))
        features = next(iter(loaded.values())).features
        self.labels: Mapping[str, Sequence[str]] = {
            name: feature.names for name, feature in features.items() if getattr(feature, "names", None)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return DatasetRows, (self._files,)

    @property
    def digests_N(self) -> np.ndarray:
        def build(folder: pathlib.Path) -> None:
            with open(folder / "digests", "wb") as file:
                for split in self._splits:
                    for table in split.iter(batch_size=1):
                        (batch,) = table.combine_chunks().to_batches()
                        file.write(row_digest(batch).to_bytes(8, "little"))

        return Numbers(made_once(build, "dataset", self.fingerprint) / "digests", np.uint64).array_N

    @property
    def file_sizes(self) -> list[tuple[str, int]]:
        return [(name, len(split)) for name, split in zip(self._names, self._splits, strict=True)]

    def __len__(self) -> int:
        return self._bounds[-1] if self._bounds else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        import pyarrow

        part, number = split_index(self._bounds, index)
        try:
            return row_values(stored_row(self._splits[part], number))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"cannot be read: {one_line(error, 160)}") from error

    def where(self, index: int) -> tuple[str, str]:
        part, number = split_index(self._bounds, index)
        return self._folder, f"row {number}" + (f" of {self._names[part]}" if len(self._names) > 1 else "")

    def read(self, index: int, path: str) -> bytes:
        return read_file(beside(self._files[0].path, path))


def _load(folder: str) -> dict[str, Any]:
    """Loads the dataset of each split, by name."""
    loaded = load_saved(folder)
    return dict(loaded) if isinstance(loaded, Mapping) else {"data": loaded}


def _find(place: Place) -> Sequence[File]:
    """Finds the file at the top of a folder that marks it as saved by `datasets`."""
    if not place.is_folder or is_address(place.path):
        return ()
    return [file for file in place.files if file.name in (_ONE, _MANY)][:1]


FORMAT = RowFormat("Hugging Face dataset", _find, DatasetRows)

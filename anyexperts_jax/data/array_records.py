"""Examples in ArrayRecord files, to store a generated domain or the user's own data.

A folder holds `dataset.json`, the manifest

    {"version": 1, "metric": "exact", "question_types": ["which", "where"], "splits": {"train": 4096, "test": 512}}

and for each split `SPLIT-00000-of-00004.array_record` and so on. A record is a NumPy .npz archive. Its array `text` is
UTF-8 JSON with all fields of `Example` that are not arrays; the others are `image`, `video`, `audio`, `image_evidence`
and `video_evidence`, if the example has them.
"""

import dataclasses
import io
import json
import pathlib
import zipfile
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, one_line, require, require_one_of
from anyexperts_jax.core.registries import METRICS
from anyexperts_jax.data.domain import SPLITS, Metric
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.source import FolderFormat, Source

MANIFEST = "dataset.json"
_VERSION = 1
_ARRAYS = ("image", "video", "audio", "image_evidence", "video_evidence")


def to_record(example: Example) -> bytes:
    """Serialises an example as one record."""
    fields = {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
    arrays = {name: fields.pop(name) for name in _ARRAYS}
    text = np.frombuffer(json.dumps(fields).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, text=text, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


def from_record(record: bytes) -> Example:
    """The inverse of `to_record`.

    Raises:
      UserError: if `to_record` did not write the record, or its example breaks a rule of `Example`.
    """
    try:
        with np.load(io.BytesIO(record), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        fields = json.loads(arrays.pop("text").tobytes())
        for name in ("question_evidence", "audio_evidence"):
            fields[name] = tuple((start, end) for start, end in fields.get(name, ()))
        return Example(**fields, **arrays)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"a record of {len(record)} bytes is not an example: {error}") from error


def export_array_record(source: Source, folder: str | pathlib.Path, split: str, *, shards: int = 1) -> pathlib.Path:
    """Writes every example of `source` as `split` of the dataset in `folder`, and returns the folder.

    Other splits in the folder are kept. The files get their final names, and the manifest its entry, once all is
    written.

    Raises:
      UserError: if the split exists already, or the folder's dataset has another metric or other question types.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    require_one_of("split", split, SPLITS)
    require(1 <= shards <= len(source), f"shards={shards} must be between 1 and the number of examples, {len(source)}")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest_for(source, folder, split)
    for shard in range(shards):
        path = folder / f"{split}-{shard:05d}-of-{shards:05d}.array_record"
        part = path.with_suffix(".part")
        # one record per group, so that random access reads only one
        writer = ArrayRecordWriter(str(part), "group_size:1")
        for index in range(shard * len(source) // shards, (shard + 1) * len(source) // shards):
            item = source[index]
            require(isinstance(item, Example), f"{split} example {index} is not a question with one answer")
            assert isinstance(item, Example)
            writer.write(to_record(item))
        writer.close()
        part.rename(path)
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=2) + "\n")
    part.rename(folder / MANIFEST)
    return folder


def is_folder(folder: pathlib.Path) -> bool:
    """Whether the folder holds a dataset of ArrayRecord files."""
    return (folder / MANIFEST).is_file()


class ArrayRecordSource:
    """The examples of one split of a folder.

    Raises:
      UserError: if the manifest is damaged, has no such split, or does not agree with the files.
    """

    def __init__(self, folder: pathlib.Path, split: str) -> None:
        from grain.sources import ArrayRecordDataSource

        manifest = _read_manifest(folder)
        splits = manifest["splits"]
        require(split in splits, f"{folder} has no split {split!r}; it has {comma_list(splits) or 'none'}")
        files = sorted(str(path) for path in folder.glob(f"{split}-*-of-*.array_record"))
        require(len(files) > 0, f"{folder} holds no file {split}-*-of-*.array_record")
        try:
            self._records = ArrayRecordDataSource(files)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"cannot read {files[0]} or one beside it: {one_line(error)}") from error
        found = len(self._records)
        require(
            found == splits[split], f"{folder} holds {found} examples of {split!r}, its {MANIFEST} says {splits[split]}"
        )
        self._folder, self._split = folder, split
        self._question_types, self._metric = tuple(manifest["question_types"]), manifest["metric"]

    @property
    def question_types(self) -> tuple[str, ...]:
        return self._question_types

    @property
    def metric(self) -> Metric:
        return self._metric

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        where = f"{self._folder} record {index} of {self._split}"
        try:
            return from_record(self._records[index])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"cannot read {where}: {one_line(error)}") from error


def _manifest_for(source: Source, folder: pathlib.Path, split: str) -> dict[str, Any]:
    """Returns the folder's manifest with the new split added."""
    ours: dict[str, Any] = {"version": _VERSION, "metric": source.metric, "question_types": list(source.question_types)}
    splits: dict[str, int] = {}
    if is_folder(folder):
        theirs = _read_manifest(folder)
        splits = theirs["splits"]
        require(split not in splits, f"{folder} already has a split {split!r}; remove it or choose another folder")
        for name, value in ours.items():
            require(theirs[name] == value, f"{folder} has {name} {theirs[name]}, the new split {value}")
    return {**ours, "splits": {**splits, split: len(source)}}


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, metric = manifest["version"], manifest["metric"]
        types, splits = manifest["question_types"], manifest["splits"]
        well_formed = all(type(name) is str for name in types) and all(type(n) is int for n in splits.values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} is not a manifest of examples: {type(error).__name__}: {error}") from error
    require(well_formed, f"{path}: question_types must be names and splits map names to numbers of examples")
    require(version == _VERSION, f"{path} has version {version!r}; this package reads version {_VERSION}")
    METRICS.check(f"{path}: metric", metric)
    return manifest


FORMAT = FolderFormat(MANIFEST, is_folder, ArrayRecordSource)

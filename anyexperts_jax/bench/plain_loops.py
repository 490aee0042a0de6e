"""Loops that a user would write by hand over the same files, with plain libraries only.

A loop reads a record, decodes its media, resamples sound to the rate that training uses, and tokenises its texts. It
checks nothing and makes neither features nor sequences. Parquet and `datasets` are read by pyarrow, JSON Lines by
`json`, and kept in memory as a whole, unlike in this package. Sound is decoded by `soundfile` and resampled by `soxr`,
pictures are decoded by Pillow, and texts are encoded by `tokenizers`.
"""

import csv
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.example import SAMPLE_RATE
from anyexperts_jax.data.row_source import RowSource
from anyexperts_jax.data.source import Source
from anyexperts_jax.tokenizers.bytes import NAME as BYTES_NAME

Loop = Callable[[Sequence[int]], None]  # takes the indices of the records
Encode = Callable[[str], object]


def plain_loop(config: DataConfig, name: str, split: str, source: Source | None = None) -> tuple[str, Loop] | None:
    """Returns (names of the libraries, loop) for a domain in a folder; None if it is generated or has no plain loop.

    Args:
      source: the domain's source, which knows the files' rows that its examples come from.
    """
    folder = config.folder_paths().get(name)
    if folder is None:
        return None
    label, encode = _bare_tokenizer(config)
    if isinstance(source, RowSource) and not source.is_corpus:
        return _rows_loop(source, label, encode)
    if records := sorted(folder.glob(f"{split}-*.array_record")):
        return f"array_record, numpy, {label}", _array_record_loop(records, encode)
    if arrow := sorted((folder / split).glob("*.arrow")):
        return f"pyarrow, soundfile, {label}", _arrow_loop(arrow, encode)
    return None


def _bare_tokenizer(config: DataConfig) -> tuple[str, Encode]:
    path = pathlib.Path(config.tokenizer)
    if config.tokenizer == BYTES_NAME or not (path / "tokenizer.json").is_file():
        return "str.encode", str.encode
    from tokenizers import Tokenizer

    return "tokenizers", Tokenizer.from_file(str(path / "tokenizer.json")).encode


def _array_record_loop(files: Sequence[pathlib.Path], encode: Encode) -> Loop:
    from array_record.python.array_record_module import ArrayRecordReader

    readers = [ArrayRecordReader(str(path)) for path in files]
    places = [(reader, place) for reader in readers for place in range(reader.num_records())]

    def loop(indices: Sequence[int]) -> None:
        for index in indices:
            reader, place = places[index]
            with np.load(io.BytesIO(reader.read([place])[0]), allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            fields = json.loads(arrays["text"].tobytes())
            encode(fields["question"])
            encode(fields["answer"])

    return loop


def _rows_loop(source: RowSource, label: str, encode: Encode) -> tuple[str, Loop] | None:
    """Returns the loop over the rows of the examples, if they are in one file of a known kind."""
    files, rows_N = sorted({source.where(index)[0] for index in range(len(source))}), source.rows_N
    path = pathlib.Path(files[0])
    if len(files) > 1 or path.suffix not in (".parquet", ".jsonl", ".tsv"):
        return None
    if path.suffix == ".parquet":
        import pyarrow.parquet

        columns = list(pyarrow.parquet.read_table(path).columns)

        def arrow(indices: Sequence[int]) -> None:
            for row in rows_N[list(indices)].tolist():
                _encode_values([column[row].as_py() for column in columns], encode)

        return f"pyarrow, {label}", arrow
    if path.suffix == ".tsv":
        return f"csv, soundfile, {label}", _table_loop(path, rows_N, encode)
    lines = path.read_bytes().splitlines()

    def json_lines(indices: Sequence[int]) -> None:
        for row in rows_N[list(indices)].tolist():
            _encode_values(json.loads(lines[row]).values(), encode)

    return f"json, {label}", json_lines


def _table_loop(path: pathlib.Path, rows_N: np.ndarray, encode: Encode) -> Loop:
    """Returns the loop over the files that a table of recordings names."""
    with open(path, newline="") as table:
        rows = [(row["file"], row["text"]) for row in csv.DictReader(table, delimiter="\t")]

    def loop(indices: Sequence[int]) -> None:
        for row in rows_N[list(indices)].tolist():
            file, text = rows[row]
            _decode((path.parent / file).read_bytes())
            encode(text)

    return loop


def _arrow_loop(files: Sequence[pathlib.Path], encode: Encode) -> Loop:
    import pyarrow

    table = pyarrow.concat_tables(pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all() for path in files)
    columns = list(table.columns)

    def loop(indices: Sequence[int]) -> None:
        for index in indices:
            _encode_values([column[index].as_py() for column in columns], encode)

    return loop


def _encode_values(values: Iterable[Any], encode: Encode) -> None:
    for value in values:
        if isinstance(value, str):
            encode(value)
        elif isinstance(value, Mapping) and value.get("bytes") is not None:
            _decode(value["bytes"])


def _decode(data: bytes) -> Any:
    if data[:4] in (b"RIFF", b"fLaC", b"OggS", b"ID3\x03") or data[:2] == b"\xff\xfb":
        import soundfile

        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        if rate == SAMPLE_RATE:
            return samples
        import soxr

        return soxr.resample(samples, rate, SAMPLE_RATE)
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

"""The loop that a user would write by hand over the same files: the plain library, and nothing of ours.

It reads a record, decodes its media and turns its texts into ids; it checks nothing, resamples nothing, makes no
features and no sequence.
"""

import io
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.tokenizers.bytes import NAME as BYTES_NAME

Loop = Callable[[Sequence[int]], None]  # over the records of these numbers
Encode = Callable[[str], object]


def plain_loop(config: DataConfig, name: str, split: str) -> tuple[str, Loop] | None:
    """(the libraries' names, the loop) of a domain in a folder; None of a generated one, or of files not known here."""
    folder = config.folder_paths().get(name)
    if folder is None:
        return None
    label, encode = _bare_tokenizer(config)
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


def _arrow_loop(files: Sequence[pathlib.Path], encode: Encode) -> Loop:
    import pyarrow

    table = pyarrow.concat_tables(pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all() for path in files)
    columns = list(table.columns)

    def loop(indices: Sequence[int]) -> None:
        for index in indices:
            _take([column[index].as_py() for column in columns], encode)

    return loop


def _take(values: Iterable[Any], encode: Encode) -> None:
    for value in values:
        if isinstance(value, str):
            encode(value)
        elif isinstance(value, Mapping) and value.get("bytes") is not None:
            _decode(value["bytes"])


def _decode(data: bytes) -> np.ndarray:
    if data[:4] in (b"RIFF", b"fLaC", b"OggS", b"ID3\x03") or data[:2] == b"\xff\xfb":
        import soundfile

        samples: np.ndarray = soundfile.read(io.BytesIO(data), dtype="float32")[0]
        return samples
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

"""Rows of JSON Lines, plain or compressed, and of JSON files with one list, read by the offsets of their lines.

Compressed files, lists and files in an object store are first copied into the cache as plain lines, once.
"""

import codecs
import contextlib
import gzip
import io
import json
import os
import pathlib
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.data.sources.cache import Numbers, fingerprint, hash_64, made_once
from anyexperts_jax.data.sources.places import File, Stream, beside, is_address, open_file, read_file, with_retries
from anyexperts_jax.data.sources.rows import RowFormat, by_suffix, split_index

_CHUNK = 1 << 20
_MAGIC = {".gz": b"\x1f\x8b", ".tgz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}


class LineRows:
    """The JSON objects in the lines of several files, one file after the other.

    Raises:
      UserError: if a file cannot be read, is cut short, or is not what its name says.
    """

    labels: Mapping[str, Sequence[str]] = {}

    def __init__(self, files: Sequence[File]) -> None:
        self._files = tuple(files)
        folders = [made_once(lambda folder, file=file: _index(file, folder), "lines", *file.key) for file in files]
        self._paths = [
            str(folder / "lines") if (folder / "lines").exists() else file.path
            for file, folder in zip(files, folders, strict=True)
        ]
        self._units = ["entry" if file.suffixes.endswith(".json") else "line" for file in files]
        self._places = [Numbers(folder / "places", np.int64, 3) for folder in folders]
        self._digests = [Numbers(folder / "digests", np.uint64) for folder in folders]
        self._bounds = np.cumsum([len(places) for places in self._places]).tolist()
        self.fingerprint = fingerprint(*(read_text(folder / "fingerprint") for folder in folders))
        self._open = OpenFiles(self._paths)

    @property
    def digests_N(self) -> np.ndarray:
        return np.concatenate([digests.array_N for digests in self._digests])

    def __len__(self) -> int:
        return self._bounds[-1] if self._bounds else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part, number = split_index(self._bounds, index)
        begin, size, _ = self._places[part].array_N[number].tolist()
        line = self._open.read(part, begin, size)
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 text (byte {error.start} of the line)") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"not valid JSON: {error}") from error
        require(isinstance(value, dict), f"a JSON {type(value).__name__}, not an object")
        return value

    def where(self, index: int) -> tuple[str, str]:
        part, number = split_index(self._bounds, index)
        return self._files[part].path, f"{self._units[part]} {self._places[part].array_N[number, 2]}"

    @property
    def file_sizes(self) -> list[tuple[str, int]]:
        return [(file.name, len(places)) for file, places in zip(self._files, self._places, strict=True)]

    def read(self, index: int, path: str) -> bytes:
        return read_file(beside(self._files[split_index(self._bounds, index)[0]].path, path))


def _close(handles: dict[int, int]) -> None:
    for handle in handles.values():
        with contextlib.suppress(OSError):
            os.close(handle)


class OpenFiles:
    """Files that any thread can read at any offset. They are opened when they are first read."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._handles)  # also runs at exit, while modules are still loaded

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, (self._paths,)

    def read(self, part: int, begin: int, size: int) -> bytes:
        """Reads bytes `begin` to `begin + size` of a file.

        Raises:
          UserError: if it cannot be read, or is shorter.
        """
        try:
            with self._lock:
                if part not in self._handles:
                    self._handles[part] = os.open(self._paths[part], os.O_RDONLY)
            data = os.pread(self._handles[part], size, begin)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}") from error
        require(len(data) == size, "the file has become shorter while it was in use")
        return data


def read_text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


def _index(file: File, folder: pathlib.Path) -> None:
    """Writes the offset and a hash of each line, and the lines themselves if they cannot be read in place."""
    plain = file.suffixes.endswith((".jsonl", ".ndjson")) and not is_address(file.path)
    total = 0
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(decompressed(file))
        outputs = {name: stack.enter_context(open(folder / name, "wb")) for name in ("places", "digests")}
        copy = None if plain else stack.enter_context(open(folder / "lines", "wb"))
        begin = 0
        listed = file.suffixes.endswith(".json")
        with _name_file_in_errors(file):
            for number, line in enumerate(_entries(lines, file) if listed else lines, start=1):
                content = line.strip()
                if content:
                    digest = hash_64(content)
                    outputs["places"].write(np.array([begin, len(line), number], np.int64).tobytes())
                    outputs["digests"].write(digest.to_bytes(8, "little"))
                    total = hash_64(total.to_bytes(8, "little") + digest.to_bytes(8, "little"))
                if copy is not None:
                    copy.write(line)
                begin += len(line)
    (folder / "fingerprint").write_text(f"{total:016x}")


@contextlib.contextmanager
def _name_file_in_errors(file: File) -> Iterator[None]:
    """Turns the exceptions of a damaged archive into a one-line error that names the file."""
    try:
        yield
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file.path} is damaged or was cut short: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        said = one_line(error, 160)
        raise UserError(f"cannot read {file.path}: {said}") from error


@contextlib.contextmanager
def decompressed(file: File) -> Iterator[Stream]:
    """Opens a file and decompresses it.

    Raises:
      UserError: if it is not what its name says, or a package is missing.
    """
    suffix = file.suffixes.rpartition(".")[2]
    kind = f".{suffix}" if f".{suffix}" in _MAGIC else None
    with open_file(file.path) as raw:
        if kind is None:
            yield io.BufferedReader(_Retried(raw, file.path)) if is_address(file.path) else raw
            return
        head = raw.read(4)
        raw.seek(0)
        named = head.startswith(_MAGIC[kind])
        require(named, f"{file.path} is not a {suffix} file, despite its name: it begins with {head!r}")
        if kind in (".gz", ".tgz"):
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream
            return
        zstandard = require_package("zstandard", "data", f"{file.path}: reading .zst files needs")
        yield io.BufferedReader(_Zstandard(raw, file.path, zstandard), _CHUNK)


class _Retried(io.RawIOBase):
    """A stream from an object store that retries failed reads."""

    def __init__(self, stream: Stream, path: str) -> None:
        self._stream, self._path = stream, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        at = self._stream.tell()

        def read() -> bytes:
            self._stream.seek(at)
            return self._stream.read(len(buffer))

        data = with_retries(read, f"read {self._path}")
        buffer[: len(data)] = data
        return len(data)


class _Zstandard(io.RawIOBase):
    """Decompresses a zstandard file with any number of frames, each of which must be complete."""

    def __init__(self, stream: Stream, path: str, zstandard: Any) -> None:
        self._stream, self._path, self._zstandard = stream, path, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun, self._ready = False, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            rest = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._zstandard.ZstdDecompressor().decompressobj(), False
            data = rest or self._stream.read(_CHUNK // 8)
            if not data:
                require(not self._begun, f"{self._path} is damaged or was cut short: its last frame has no end")
                return 0
            self._begun = True
            try:
                self._ready = self._frame.decompress(data)
            except self._zstandard.ZstdError as error:
                raise UserError(f"{self._path} is damaged or was cut short: {error}") from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _entries(stream: Stream, file: File) -> Iterator[bytes]:
    """Yields the entries of a file with one JSON list, each as a line, without loading the whole file."""
    decoder = json.JSONDecoder()
    to_text = codecs.getincrementaldecoder("utf-8-sig")()
    text = to_text.decode(stream.read(_CHUNK)).lstrip()
    require(text.startswith("["), f"{file.path} holds no JSON list; give one, or an object a line in a .jsonl file")
    at = 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError as error:
            data = stream.read(_CHUNK)
            more = to_text.decode(data, final=not data)
            require(bool(data), f"{file.path} is not valid JSON, or was cut short: {error}")
            text, at = text[at:] + more, 0
            continue
        yield json.dumps(value).encode() + b"\n"


_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst", ".json")
FORMAT = RowFormat("JSON Lines", by_suffix(*_SUFFIXES), LineRows)

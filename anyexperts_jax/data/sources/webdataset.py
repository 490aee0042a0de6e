"""Rows of WebDataset tars: a sample's files have the same name up to the first dot; the rest tells their kind.

Only the offsets of files are kept. A tar that is compressed or in an object store is first copied into the cache.
"""

import contextlib
import os
import pathlib
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.files import parse_json_object
from anyexperts_jax.data.sources.cache import Numbers, fingerprint, hash_64, made_once
from anyexperts_jax.data.sources.lines import OpenFiles, decompressed
from anyexperts_jax.data.sources.places import File, beside, is_address, read_file
from anyexperts_jax.data.sources.rows import RowFormat, by_suffix, split_index

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
SOUNDS = ("wav", "flac", "mp3", "ogg")
VIDEOS = ("mp4", "mov", "mkv", "webm", "avi")
KIND_OF = {**dict.fromkeys(IMAGES, "image"), **dict.fromkeys(SOUNDS, "audio"), **dict.fromkeys(VIDEOS, "video")}
_TEXTS = {"txt": "text", "text": "text", "caption": "text", "transcript": "text", "cls": "answer"}
_ENTRY = 4  # sample, begin, size, hash of the name
_OUTPUTS = ("members", "samples", "digests", "name_places", "names")


class TarRows:
    """The samples of tar files, one after the other.

    A sample's `.json` gives its columns, `.txt` is `text`, `.cls` is `answer`, and a picture, sound or film is in the
    column of its kind, several in the order of their names. Files that the sample names are looked up in the tar.

    Raises:
      UserError: if a tar is damaged, cut short or not a tar.
    """

    labels: Mapping[str, Sequence[str]] = {}

    def __init__(self, files: Sequence[File]) -> None:
        self._files = tuple(files)
        self._folders = [
            made_once(lambda folder, file=file: _index(file, folder), "tar members", *file.key) for file in files
        ]
        self._paths = [
            str(folder / "data.tar") if (folder / "data.tar").exists() else file.path
            for file, folder in zip(files, self._folders, strict=True)
        ]
        self._members = [Numbers(folder / "members", np.int64, _ENTRY) for folder in self._folders]
        self._samples = [Numbers(folder / "samples", np.int64) for folder in self._folders]  # first member of each
        self._digests = [Numbers(folder / "digests", np.uint64) for folder in self._folders]
        self._by_name = [Numbers(folder / "by_name", np.int64, 2) for folder in self._folders]  # hash, member
        self._name_places = [Numbers(folder / "name_places", np.int64) for folder in self._folders]
        self._names = OpenFiles([str(folder / "names") for folder in self._folders])
        self._bounds = np.cumsum([len(samples) for samples in self._samples]).tolist()
        self.fingerprint = fingerprint(*(hash_64(digests.array_N.tobytes()) for digests in self._digests))
        self._open = OpenFiles(self._paths)

    @property
    def digests_N(self) -> np.ndarray:
        return np.concatenate([digests.array_N for digests in self._digests])

    @property
    def file_sizes(self) -> list[tuple[str, int]]:
        return [(file.name, len(samples)) for file, samples in zip(self._files, self._samples, strict=True)]

    def __len__(self) -> int:
        return self._bounds[-1] if self._bounds else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part, number = split_index(self._bounds, index)
        row: dict[str, Any] = {}
        for name, data in self._files_of(part, number):
            _, _, kind = _split_name(name)
            last = kind.rpartition(".")[2]
            if last == "json":
                row |= parse_json_object(_decoded(data, name), name)
            elif last in KIND_OF:
                row.setdefault(KIND_OF[last], []).append(data)
            elif last in _TEXTS:
                row[_TEXTS[last]] = _decoded(data, name).strip()
        require(bool(row), "the sample holds no file that is known: json, txt, cls, pictures, sounds or films")
        return row

    def where(self, index: int) -> tuple[str, str]:
        part, number = split_index(self._bounds, index)
        first = int(self._samples[part].array_N[number])
        return self._files[part].path, f"sample {_split_name(self._name(part, first))[1]}"

    def read(self, index: int, path: str) -> bytes:
        """Reads a member of the tar by its full name or beside the sample's files, or a file beside the tar."""
        part, number = split_index(self._bounds, index)
        folder = _split_name(self._name(part, int(self._samples[part].array_N[number])))[0]
        by_name = self._by_name[part].array_N
        for name in (path, f"{folder}/{path}" if folder else path):
            wanted = _name_hash(name)
            found = int(np.searchsorted(by_name[:, 0], wanted))
            if found < len(by_name) and by_name[found, 0] == wanted:
                _, begin, size, _ = self._members[part].array_N[by_name[found, 1]].tolist()
                return self._open.read(part, begin, size)
        return read_file(beside(self._files[part].path, path))

    def _files_of(self, part: int, number: int) -> list[tuple[str, bytes]]:
        """Returns (name, bytes) of a sample's files, sorted by name."""
        members, samples = self._members[part].array_N, self._samples[part].array_N
        stop = int(samples[number + 1]) if number + 1 < len(samples) else len(members)
        found = []
        for member in range(int(samples[number]), stop):
            _, begin, size, _ = members[member].tolist()
            found.append((self._name(part, member), self._open.read(part, begin, size)))
        return sorted(found)

    def _name(self, part: int, member: int) -> str:
        """Returns a member's name from its header in the tar."""
        begin, stop = self._name_places[part].array_N[member : member + 2].tolist()
        return self._names.read(part, begin, stop - begin).decode("utf-8", "surrogateescape")


def _split_name(name: str) -> tuple[str, str, str]:
    """Returns (folder, key with its folder, kind): "a/b.left.png" gives ("a", "a/b", "left.png")."""
    folder, _, base = name.rpartition("/")
    key, _, kind = base.partition(".")
    return folder, f"{folder}/{key}" if folder else key, kind.lower()


def _name_hash(name: str) -> int:
    return hash_64(name.encode("utf-8", "surrogateescape")) >> 1


def _index(file: File, folder: pathlib.Path) -> None:
    """Writes the offset and the sample of each member, and a hash of each sample."""
    path = file.path
    if is_address(file.path) or not file.suffixes.endswith(".tar"):
        path = str(folder / "data.tar")
        with decompressed(file) as source, open(path, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    with open(path, "rb") as raw:
        raw.seek(max(os.path.getsize(path) - 1024, 0))
        require(raw.read() == bytes(1024), f"{file.path} is not a tar file, or was cut short: it has no end mark")
    try:
        with contextlib.ExitStack() as stack:
            tar = stack.enter_context(tarfile.open(path, "r:"))
            outputs = (stack.enter_context(open(folder / name, "wb")) for name in _OUTPUTS)
            _write_index(tar, file, *outputs)
        _sort_names(folder)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{file.path} is not a tar file, is damaged or was cut short: {error}") from error


def _sort_names(folder: pathlib.Path) -> None:
    """Writes the members sorted by the hashes of their names, to look up files that records name."""
    hashes_N = Numbers(folder / "members", np.int64, _ENTRY).array_N[:, 3]
    order_N = np.argsort(hashes_N, kind="stable")
    np.stack([hashes_N[order_N], order_N], axis=1).tofile(folder / "by_name")


def _write_index(tar: tarfile.TarFile, file: File, *outputs: BinaryIO) -> None:
    """Writes the files of _OUTPUTS member by member, without keeping members in memory."""
    members, samples, digests, name_places, names = outputs
    count, samples_seen, key, digest = 0, 0, None, b""
    name_places.write(_numbers(0))
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        if not member.isfile() or member.name.rpartition("/")[2].startswith("."):  # hidden, as a Mac's "._a.json"
            continue
        own = _split_name(member.name)[1]
        if own != key:
            if key is not None:
                digests.write(hash_64(digest).to_bytes(8, "little"))
            samples.write(_numbers(count))
            samples_seen, key, digest = samples_seen + 1, own, b""
        data = tar.extractfile(member)
        content = b"" if data is None else data.read()
        require(len(content) == member.size, f"{file.path} is damaged or was cut short, in {member.name}")
        name = member.name.encode("utf-8", "surrogateescape")
        digest += _split_name(member.name)[2].encode("utf-8", "surrogateescape")
        digest += hash_64(content).to_bytes(8, "little")
        members.write(_numbers(samples_seen - 1, member.offset_data, member.size, _name_hash(member.name)))
        names.write(name)
        name_places.write(_numbers(names.tell()))
        count += 1
    if key is not None:
        digests.write(hash_64(digest).to_bytes(8, "little"))


def _numbers(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start})") from error


FORMAT = RowFormat("WebDataset tars", by_suffix(".tar", ".tar.gz", ".tgz", ".tar.zst"), TarRows)

"""Rows of text files: each is a document, or several if it is long, cut at blank lines."""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.data.sources.cache import Numbers, fingerprint, hash_64, made_once
from anyexperts_jax.data.sources.lines import OpenFiles, decompressed
from anyexperts_jax.data.sources.places import File, Stream, beside, is_address, read_file
from anyexperts_jax.data.sources.rows import RowFormat, by_suffix, split_index

PIECE = 8192  # bytes after which the next blank line ends a piece
_LONGEST = 8 * PIECE  # bytes after which any line end does, or else any boundary between characters


class TextRows:
    """The pieces of text files, one after the other: {"text": ...}.

    Raises:
      UserError: if a file cannot be read or decompressed.
    """

    labels: Mapping[str, Sequence[str]] = {}

    def __init__(self, files: Sequence[File]) -> None:
        self._files = tuple(files)
        self._folders = [made_once(lambda folder, file=file: _index(file, folder), "text", *file.key) for file in files]
        self._paths = [
            str(folder / "text") if (folder / "text").exists() else file.path
            for file, folder in zip(files, self._folders, strict=True)
        ]
        self._pieces = [Numbers(folder / "pieces", np.int64, 2) for folder in self._folders]  # begin, size
        self._digests = [Numbers(folder / "digests", np.uint64) for folder in self._folders]
        self._bounds = np.cumsum([len(pieces) for pieces in self._pieces]).tolist()
        self.fingerprint = fingerprint(*(hash_64(digests.array_N.tobytes()) for digests in self._digests))
        self._open = OpenFiles(self._paths)

    @property
    def digests_N(self) -> np.ndarray:
        """Hashes of pieces, or with several files of their file, so that a file's pieces are in one split."""
        if len(self._files) == 1:
            return self._digests[0].array_N
        wholes = [hash_64(digests.array_N.tobytes()) for digests in self._digests]
        return np.repeat(np.array(wholes, np.uint64), [len(pieces) for pieces in self._pieces])

    @property
    def file_sizes(self) -> list[tuple[str, int]]:
        return [(file.name, len(pieces)) for file, pieces in zip(self._files, self._pieces, strict=True)]

    def __len__(self) -> int:
        return self._bounds[-1] if self._bounds else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part, number = split_index(self._bounds, index)
        begin, size = self._pieces[part].array_N[number].tolist()
        try:
            return {"text": self._open.read(part, begin, size).decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 text (byte {begin + error.start} of the file)") from error

    def where(self, index: int) -> tuple[str, str]:
        part, number = split_index(self._bounds, index)
        return self._files[part].path, f"from byte {int(self._pieces[part].array_N[number][0])}"

    def read(self, index: int, path: str) -> bytes:
        return read_file(beside(self._files[split_index(self._bounds, index)[0]].path, path))


def _index(file: File, folder: pathlib.Path) -> None:
    plain = file.suffixes.endswith((".txt", ".md")) and not is_address(file.path)
    begin = 0
    with (
        decompressed(file) as stream,
        open(folder / "pieces", "wb") as pieces,
        open(folder / "digests", "wb") as digests,
        open(os.devnull if plain else folder / "text", "wb") as copy,
    ):
        for piece in _pieces(stream, file):
            if piece.strip():
                pieces.write(np.array([begin, len(piece)], np.int64).tobytes())
                digests.write(hash_64(piece).to_bytes(8, "little"))
            copy.write(piece)
            begin += len(piece)


def _pieces(stream: Stream, file: File) -> Iterator[bytes]:
    """Yields runs of lines that end at the first blank line after PIECE bytes."""
    piece = bytearray()
    try:
        for line in iter(lambda: stream.readline(_LONGEST), b""):
            piece += line
            blank = not line.strip()
            if (len(piece) >= PIECE and blank) or len(piece) >= _LONGEST:
                keep = 0 if blank or line.endswith(b"\n") else _cut_character(piece)
                yield bytes(piece[: len(piece) - keep])
                piece = piece[len(piece) - keep :]
    except (EOFError, OSError) as error:
        raise UserError(f"{file.path} is damaged or was cut short: {error}") from error
    require(b"\0" not in piece[:PIECE], f"{file.path} is not a text file, despite its name: it holds NUL bytes")
    if piece:
        yield bytes(piece)


def _cut_character(piece: bytearray) -> int:
    """Returns how many bytes at the end belong to an incomplete character."""
    for back in range(1, 4):
        lead = piece[-back]
        if lead & 0xC0 == 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return back if back < needed else 0
        if lead < 0x80:
            return 0
    return 0


FORMAT = RowFormat("text", by_suffix(".txt", ".md", ".txt.gz", ".txt.zst"), TextRows)

"""A cache of what is computed once per file: where its rows begin, and a copy if it has no random access.

It is in $ANYEXPERTS_CACHE, or in anyexperts/ under $XDG_CACHE_HOME or ~/.cache. Entries are keyed by the file's path,
size and time. Deleting it costs only the time to build it again.
"""

import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError

_VERSION = "1"  # version of the entries; another one rebuilds everything


def cache_folder() -> pathlib.Path:
    """Returns the folder of the cache."""
    own = os.environ.get("ANYEXPERTS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(own) if own else pathlib.Path(base) / "anyexperts"


def made_once(build: Callable[[pathlib.Path], None], *key: str | int) -> pathlib.Path:
    """Returns the folder that `build` filled for this key, in this call or an earlier one.

    The folder appears only when it is complete.

    Raises:
      UserError: if the cache cannot be written.
    """
    folder = cache_folder() / _digest(*key)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = pathlib.Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent}: {error.strerror}; set ANYEXPERTS_CACHE to a folder"
        ) from error
    try:
        build(fresh)
        try:
            fresh.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _digest(*key: str | int) -> str:
    return hashlib.blake2b("\0".join([_VERSION, *map(str, key)]).encode(), digest_size=16).hexdigest()


def fingerprint(*parts: str | int) -> str:
    """Returns a short hash of the parts."""
    return _digest(*parts)[:16]


def hash_64(data: bytes) -> int:
    """Returns 64 bits of a hash that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Numbers:
    """The numbers in a file, mapped into memory as `array_N`, or [N, columns]. It is pickled as the path."""

    def __init__(self, path: pathlib.Path, dtype: type, columns: int = 1) -> None:
        self._given = path, dtype, columns
        shape = (-1, columns) if columns > 1 else (-1,)
        if path.stat().st_size == 0:
            self.array_N: np.ndarray = np.zeros((0, columns) if columns > 1 else (0,), dtype)
        else:
            mapped = np.memmap(path, dtype, mode="r").reshape(shape)
            self.array_N = mapped.view(np.ndarray)  # indexing a plain ndarray is three times as fast as a memmap

    def __reduce__(self) -> tuple[Any, ...]:
        return Numbers, self._given

    def __len__(self) -> int:
        return len(self.array_N)

"""Finds files by path, pattern, folder or address, on this machine or, through fsspec, in an object store.

A failed call to a store is retried after growing waits. If it keeps failing, the error is one line without keys or
tokens.
"""

import dataclasses
import glob
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.core.extras import require_package

T = TypeVar("T")
Stream = Any  # seekable bytes; files, archives and stores have no common type

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WILD = re.compile(r"[*?\[]")
_SECRETS = (
    (re.compile(r"//[^/@\s]+@"), "//"),
    (re.compile(r"\?\S+"), ""),
    (re.compile(r"-----BEGIN [^-]+-----.*?(-----END [^-]+-----|$)", re.DOTALL), "***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"), r"\1 ***"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{12,}"), "***"),
    (re.compile(r"(?i)\b(\w*(?:key|token|secret|signature|password|credential)\w*)(['\"]?\s*[=:]\s*)\S+"), r"\1\2***"),
)
_NEEDS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


class StoreError(UserError):
    """The store cannot be reached or refuses access. No row is at fault, so none is skipped because of it."""


@dataclasses.dataclass(frozen=True)
class File:
    """A file. `name` is its path relative to the place; `version` changes when the file does."""

    path: str
    name: str
    size: int
    version: str

    @property
    def suffixes(self) -> str:
        """The suffixes of its name, in lower case: ".jsonl.gz"."""
        base = self.name.rpartition("/")[2].lower()
        return base[base.index(".") :] if "." in base.lstrip(".") else ""

    @property
    def key(self) -> tuple[str, int, str]:
        """The key under which the cache keeps what was computed from the file."""
        return self.path if is_address(self.path) else os.path.abspath(self.path), self.size, self.version


@dataclasses.dataclass(frozen=True)
class Place:
    """The files at a path, sorted by name. For a folder these are all files below it except hidden ones."""

    path: str
    is_folder: bool
    files: tuple[File, ...]


def is_address(path: str) -> bool:
    """Whether it is the address of an object store, such as gs://bucket/data, and not a path on this machine."""
    return bool(_SCHEME.match(path))


def find_files(place: str) -> Place:
    """Finds the files at a path, a pattern such as data/*.jsonl, a folder or an address.

    Raises:
      UserError: if there are none, the store cannot be reached, or the address contains a password.
    """
    require("\0" not in place, f"data path {place!r} has a NUL character in it; no file system takes that")
    return _find_remote(place) if is_address(place) else _find_local(os.path.expanduser(place))


def _find_local(place: str) -> Place:
    if os.path.isdir(place):
        found = []
        for folder, below, names in os.walk(place, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
        files = tuple(_local_file(path, os.path.relpath(path, place)) for path in sorted(found))
        require(len(files) > 0, f"the data directory {place} is empty")
        return Place(place, True, files)
    paths = sorted(glob.glob(place, recursive=True)) if _WILD.search(place) and not os.path.exists(place) else [place]
    paths = [path for path in paths if os.path.isfile(path)]
    what = "directory" if not os.path.splitext(place)[1] else "file"
    require(len(paths) > 0, f"the data {what} {place} does not exist")
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    return Place(place, False, tuple(_local_file(path, os.path.relpath(path, base or ".")) for path in paths))


def _local_file(path: str, name: str) -> File:
    status = os.stat(path)
    return File(path, name.replace(os.sep, "/"), status.st_size, str(status.st_mtime_ns))


def _find_remote(place: str) -> Place:
    system, root = _system(place)
    scheme = place.partition("://")[0]

    def look() -> tuple[bool, list[dict[str, Any]]]:
        system.invalidate_cache()
        if _WILD.search(root):
            return False, list(system.glob(root, detail=True).values())
        if system.isfile(root):
            return False, [system.info(root)]
        return True, list(system.find(root, detail=True).values())

    is_folder, infos = with_retries(look, f"look at {place}")
    infos = sorted((info for info in infos if info["type"] == "file"), key=lambda info: info["name"])
    names = [info["name"].lstrip("/") for info in infos]
    base = root.strip("/") if is_folder else os.path.commonpath([os.path.dirname(n) for n in names] or [""])
    files = []
    for info, name in zip(infos, names, strict=True):
        version = str(info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime") or "")
        relative = name[len(base) :].lstrip("/")
        if not any(part.startswith(".") for part in relative.split("/")):
            files.append(File(f"{scheme}://{name}", relative, int(info["size"]), version))
    require(len(files) > 0, f"there is no data at {place}: no such file or folder, or it is empty")
    return Place(place, is_folder, tuple(files))


def open_file(path: str) -> Stream:
    """Opens a file as a seekable stream of bytes.

    Raises:
      UserError: if it cannot be opened.
    """
    if is_address(path):
        system, root = _system(path)
        return with_retries(lambda: _opened(system, root), f"read {path}")
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _opened(system: Any, root: str) -> Stream:
    stream: Stream = system.open(root, "rb")
    return stream


def read_file(path: str) -> bytes:
    """Reads all bytes of a file.

    Raises:
      UserError: if it cannot be read.
    """
    if is_address(path):
        system, root = _system(path)
        return with_retries(lambda: bytes(system.cat_file(root)), f"read {path}")
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise UserError(f"there is no file {path}: {error.strerror}") from error


def beside(path: str, relative: str) -> str:
    """Returns the path of a file that a record in `path` names, relative to its folder or absolute."""
    if is_address(relative) or os.path.isabs(relative):
        return relative
    folder = path.rpartition("/")[0]
    return f"{folder}/{relative}" if folder else relative


def with_retries(action: Callable[[], T], what: str, sleep: Callable[[float], None] | None = None) -> T:
    """Returns what `action` returns; after a failure of a store that may be temporary, retries after each of WAITS.

    Args:
      what: completes "cannot ...", for the message.
      sleep: None: `time.sleep`.

    Raises:
      UserError: if the file does not exist.
      StoreError: if access is denied, or every try failed.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"cannot {without_secrets(what)}: there is no such file or bucket") from error
        except PermissionError as error:
            raise StoreError(f"cannot {without_secrets(what)}: access is denied; {_ADVICE}") from error
        except _store_errors() as error:
            said = without_secrets(one_line(error))[:160] or type(error).__name__
            if any(word in type(error).__name__ for word in ("Credential", "Auth")):
                raise StoreError(f"cannot {without_secrets(what)}: {said}; {_ADVICE}") from error
            if wait is None:
                tries = f"tried {len(WAITS) + 1} times over {sum(WAITS):g} s"
                advice = "the same command goes on from the last checkpoint"
                raise StoreError(f"cannot {without_secrets(what)}: {said} ({tries}; {advice})") from error
            (sleep or time.sleep)(wait)
    raise AssertionError("the last try returns or raises")


_ADVICE = "sign in, or give keys in the environment as the store's own tools read them"


def without_secrets(text: str) -> str:
    """Removes passwords, signatures, keys and tokens that an address or a store's message may contain."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def _store_errors() -> tuple[type[BaseException], ...]:
    """Returns the exceptions that a store's client may raise. Only loaded packages can have raised one."""
    found: list[type[BaseException]] = [OSError, RuntimeError, ValueError, EOFError]
    for module, names in (
        ("botocore.exceptions", ("BotoCoreError", "ClientError")),
        ("aiohttp", ("ClientError",)),
        ("google.auth.exceptions", ("GoogleAuthError",)),
    ):
        loaded = sys.modules.get(module)
        found += [getattr(loaded, name) for name in names if loaded is not None]
    return tuple(found)


def _system(place: str) -> tuple[Any, str]:
    """Returns fsspec's file system for an address, and the path in it."""
    scheme = place.partition("://")[0]
    require(
        without_secrets(place) == place,
        f"{without_secrets(place)}: the address holds a password or signature, which a run would write down; {_ADVICE}",
    )
    fsspec = require_package("fsspec", "remote", f"{place}: reading from object stores needs")
    try:
        system, root = fsspec.core.url_to_fs(place)
    except ImportError as error:
        known = f"the package {_NEEDS[scheme]}: pip install 'anyexperts-jax[remote]'" if scheme in _NEEDS else None
        raise UserError(f"{place}: reading {scheme}:// needs {known or f'a package: {one_line(error)}'}") from error
    except _store_errors() as error:
        said = without_secrets(one_line(error))[:160]
        raise UserError(f"cannot read {place}: {said}; give a path, or an address as gs:// or s3://") from error
    return system, root

"""Checks that a checkpoint's files are what was written, by checksums, or for older checkpoints by reading them.

Only verified damage is reported: a file that is missing, has another size or checksum, or cannot be decoded.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Iterable

from anyexperts_jax.core.errors import UserError, one_line
from anyexperts_jax.core.files import parse_json_object, read_text

CHECKSUMS_NAME = "checksums.json"
TREE_ITEMS = ("params", "router_bias", "optimizer")  # items with arrays, each a folder of a checkpoint
JSON_ITEMS = ("config", "data")
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # files that Orbax may write after the checksums
_CHUNK_BYTES = 1 << 20
_READERS = 8  # threads; zlib releases Python's lock


@dataclasses.dataclass(frozen=True)
class Damage:
    """A file that is not what was written."""

    path: pathlib.Path
    what: str  # "is missing", "has 12 bytes and not 90"

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


def write_checksums(folder: pathlib.Path) -> None:
    """Writes checksums.json: size and CRC-32 of every file in a checkpoint's folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    wanted = [path for path in files if path.relative_to(folder).as_posix() not in _LATER]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        sums = list(pool.map(_crc32, wanted))
    table = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, crc] for path, crc in zip(wanted, sums, strict=True)
    }
    (folder / CHECKSUMS_NAME).write_text(json.dumps({"algorithm": "crc32", "files": table}) + "\n", encoding="utf-8")


def find_damage(folder: pathlib.Path, items: Iterable[str], share: tuple[int, int] = (0, 1)) -> Damage | None:
    """The first file of these items of a checkpoint that is not what was written; None if all files are intact.

    A checkpoint without checksums, of an earlier version, is read instead. That finds files that are missing, truncated
    or cannot be decoded, but not changed numbers.

    Args:
      share: (index, count): compares this process's share of the files only; the others compare the rest.

    Raises:
      UserError: if an existing file cannot be read.
    """
    if not folder.is_dir():
        return Damage(folder, "is missing")
    missing = next((item for item in items if not (folder / item).is_dir()), None)
    if missing is not None:
        return Damage(folder / missing, "is missing")
    if not (folder / CHECKSUMS_NAME).exists():
        return _find_unreadable(folder, items) if share[0] == 0 else None
    try:
        table = _read_table(folder / CHECKSUMS_NAME)
    except UserError as error:
        return Damage(folder / CHECKSUMS_NAME, f"is not what was written ({error})")
    wanted = {name: known for name, known in table.items() if name.split("/")[0] in items}
    for name, (size, _) in wanted.items():
        damage = _find_another_size(folder / name, size)
        if damage is not None:
            return damage
    mine = list(wanted.items())[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(_crc32, (folder / name for name, _ in mine))
        for (name, (_, crc)), found in zip(mine, sums, strict=True):
            if found != crc:
                return Damage(folder / name, "is not what was written: its checksum is another")
    return None


def _crc32(path: pathlib.Path) -> int:
    crc = 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return crc


def _read_table(path: pathlib.Path) -> dict[str, tuple[int, int]]:
    """The size and checksum of each file, by its path in the checkpoint's folder."""
    files = parse_json_object(read_text(path, "file"), path.name).get("files")
    if not isinstance(files, dict):
        raise UserError("it has no table of files")
    table = {}
    for name, known in files.items():
        if not (isinstance(known, list) and len(known) == 2 and all(type(number) is int for number in known)):
            raise UserError(f"its entry of {name} is not a size and a checksum")
        table[name] = (known[0], known[1])
    return table


def _find_another_size(path: pathlib.Path, size: int) -> Damage | None:
    try:
        found = os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return Damage(path, "is missing")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return None if found == size else Damage(path, f"has {found} bytes and not the {size} that were written")


def _find_unreadable(folder: pathlib.Path, items: Iterable[str]) -> Damage | None:
    for item in items:
        if item in JSON_ITEMS:
            damage = find_undecodable_json(folder / item / "metadata")
        else:
            damage = find_undecodable_json(folder / item / "_METADATA") or _find_undecodable_array(folder / item)
        if damage is not None:
            return damage
    return None


def find_undecodable_json(path: pathlib.Path) -> Damage | None:
    """The damage of a file that is missing or is not a JSON object; None if it is fine.

    Raises:
      UserError: if it cannot be read.
    """
    if not path.is_file():
        return Damage(path, "is missing")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        parse_json_object(data.decode(), path.name)
    except (UnicodeDecodeError, UserError) as error:
        return Damage(path, f"cannot be decoded ({error})")
    return None


def _find_undecodable_array(folder: pathlib.Path) -> Damage | None:
    """Reads every array of an item in turn, with TensorStore.

    Orbax reads them all at once, and when one fails, abandons the tasks of the others, which then complain on the
    terminal.
    """
    import tensorstore

    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    try:
        names = tensorstore.KvStore.open(base).result().list().result()
        arrays = sorted(name.removesuffix(b"/.zarray").decode() for name in names if name.endswith(b"/.zarray"))
        for name in arrays:
            store = {"driver": "zarr", "kvstore": {**base, "path": f"{name}/"}}
            tensorstore.open(store, open=True).result().read().result()
    except ValueError as error:  # TensorStore raises nothing else; the text contains its status code
        if "PERMISSION_DENIED" in str(error):
            raise UserError(f"cannot read {folder}: {_first_words(error)}") from error
        return Damage(folder, f"cannot be decoded ({_first_words(error)})")
    return None if arrays else Damage(folder, "holds no arrays")


def _first_words(error: Exception) -> str:
    return one_line(error, 200)

"""Sources of tensors: a folder of safetensors files here, and a GGUF file in `gguf_file`."""

import contextlib
import dataclasses
import json
import math
import mmap
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, one_line, require
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.core.files import parse_json_object, read_text

_HEADER_SIZE = 8  # bytes that hold the length of a file's header
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, Any] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
EIGHT_BIT: dict[str, Any] = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}  # read where scales are expected beside it
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape and type, known from the header without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype  # of the array that `read` returns
    stored: str  # the file's name of the stored type: "BF16", "Q4_1"


@runtime_checkable
class Reader(Protocol):
    """Reads tensors while their files are open; several threads may call it at once."""

    def read(self, name: str) -> np.ndarray:
        """Returns the whole tensor, in `TensorInfo.dtype`."""
        ...


@runtime_checkable
class Source(Protocol):
    """A checkpoint's tensors."""

    @property
    def where(self) -> str:
        """The path, for error messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, by their names on the hub."""
        ...

    def opened(self) -> contextlib.AbstractContextManager[Reader]:
        """Opens the files; at the end they are closed and unmapped from memory."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class SafetensorsFolder:
    """A folder with one `model.safetensors`, or with several files and their index."""

    folder: pathlib.Path
    file_of: Mapping[str, str]  # tensor -> file name
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def find(cls, folder: pathlib.Path, *, eight_bit: bool = False) -> "SafetensorsFolder":
        """Reads the headers of the folder's files.

        Args:
          eight_bit: whether 8-bit floats are taken too, as they are.

        Raises:
          UserError: if the package is missing, a file is missing or damaged, or a tensor has a type that is not read.
        """
        library = require_safetensors()
        named = _index(folder)
        files = sorted(set(named.values())) if named else [SINGLE]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise UserError(_missing_message(folder, missing, len(files), bool(named)))
        file_of, tensors = {}, {}
        for name in files:
            with _open(library, folder / name) as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    found = file.get_slice(key)
                    file_of[key], tensors[key] = name, _info(key, found, folder / name, eight_bit)
        lost = [key for key in named if file_of.get(key) != named[key]]
        require(not lost, f"{folder / INDEX} names tensors that are not in their files: {comma_list(lost[:_SHOWN])}")
        return cls(folder, file_of, tensors)

    @property
    def where(self) -> str:
        return str(self.folder)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Reader]:
        yield _Files(self)


class _Files:
    """Maps the files of a folder into memory when they are first read.

    The library `safetensors` would read each tensor into memory of its own first, which takes twice as long as the copy
    that follows.
    """

    def __init__(self, source: SafetensorsFolder) -> None:
        self._source, self._mapped = source, dict[str, _MappedFile]()
        self._lock = threading.Lock()

    def read(self, name: str) -> np.ndarray:
        file_name = self._source.file_of[name]
        with self._lock:
            if file_name not in self._mapped:
                self._mapped[file_name] = _MappedFile(self._source.folder / file_name)
        return self._mapped[file_name].tensor(name, self._source.tensors[name])


class _MappedFile:
    """A file mapped into memory while a view of it exists. `SafetensorsFolder.find` has checked its header."""

    def __init__(self, path: pathlib.Path) -> None:
        with path.open("rb") as file:
            self._contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data = _HEADER_SIZE + int.from_bytes(self._contents[:_HEADER_SIZE], "little")
        self._header: dict[str, Any] = json.loads(self._contents[_HEADER_SIZE : self._data])

    def tensor(self, name: str, info: TensorInfo) -> np.ndarray:
        """Returns a tensor as a view of the file."""
        first, _ = self._header[name]["data_offsets"]
        return np.frombuffer(self._contents, info.dtype, math.prod(info.shape), self._data + first).reshape(info.shape)


def require_safetensors() -> Any:
    """Returns the package `safetensors`.

    Raises:
      UserError: if it is not installed; the message says how to install it.
    """
    return require_package("safetensors", "pretrained")


def _index(folder: pathlib.Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        return {}
    weight_map = parse_json_object(read_text(path, INDEX), str(path)).get("weight_map")
    fits = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    require(fits and bool(weight_map), f"{path} has no weight_map of tensors and files")
    assert isinstance(weight_map, dict)
    outside = [name for name in weight_map.values() if pathlib.PurePath(name).name != name]
    require(not outside, f"{path} names a file outside its folder: {json.dumps(outside[:1])}")
    return weight_map


def _missing_message(folder: pathlib.Path, missing: list[str], count: int, indexed: bool) -> str:
    if indexed:
        return (
            f"{folder} lacks {len(missing)} of the {count} files that {INDEX} names: {comma_list(missing[:_SHOWN])}; "
            "download them again"
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".h5"))
    hint = f"; {comma_list(others[:_SHOWN])} cannot be read, save the model as safetensors" if others else ""
    return f"{folder} holds neither {SINGLE} nor {INDEX}{hint}"


@contextlib.contextmanager
def _open(library: Any, path: pathlib.Path) -> Iterator[Any]:
    try:
        with library.safe_open(path, "numpy") as file:
            yield file
    except library.SafetensorError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def _info(name: str, found: Any, path: pathlib.Path, eight_bit: bool) -> TensorInfo:
    stored, known = found.get_dtype(), {**DTYPES, **(EIGHT_BIT if eight_bit else {})}
    require(
        stored in known,
        f"{path}: tensor {name} is {stored}, a quantised or whole-number type that is not read, only "
        f"{comma_list(DTYPES)}; dequantise the checkpoint first",
    )
    return TensorInfo(tuple(found.get_shape()), known[stored], stored)

"""Opens tokenizers, saves copies and loads them."""

import dataclasses
import pathlib

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.core.registries import TOKENIZERS
from anyexperts_jax.tokenizers.base import Tokenizer, TokenizerKind, TokenizerRecord
from anyexperts_jax.tokenizers.bytes import BYTES
from anyexperts_jax.tokenizers.bytes import NAME as BYTES_NAME
from anyexperts_jax.tokenizers.files import as_text, parse_object, read_text

RECORD = "anyexperts_tokenizer.json"


def open_tokenizer(source: str) -> Tokenizer:
    """Opens the tokenizer that a configuration names: "bytes", or a path.

    A path is a folder with a tokenizer.json or a copy made by `save_tokenizer`, a tokenizer.json, or a
    GGUF file.

    Raises:
      UserError: if there is no tokenizer at the path, or it is damaged.
    """
    if source == BYTES_NAME:
        return BYTES
    path = pathlib.Path(source)
    require(path.exists(), f"tokenizer {source!r} does not exist; give {BYTES_NAME!r} or a path")
    if (path / RECORD).is_file():
        return load_tokenizer(path)
    for name in TOKENIZERS:
        kind: TokenizerKind = TOKENIZERS[name]
        if kind.reads(path):
            return kind.load(path)
    wanted = f"{BYTES_NAME!r}, a folder with tokenizer.json, or a GGUF file"
    raise UserError(f"there is no tokenizer in {path}: give {wanted}")


def save_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Creates `folder` and writes a copy of the tokenizer and its record into it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    record = dataclasses.asdict(TokenizerRecord.of(tokenizer))
    (folder / RECORD).write_text(as_text(record), encoding="utf-8")  # last, since a copy counts only with its record


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Loads a tokenizer that `save_tokenizer` wrote.

    Raises:
      UserError: if there is none, its kind is unknown, or it does not match the record.
    """
    record = read_record(folder)
    TOKENIZERS.check(f"{folder / RECORD}: kind", record.kind)
    tokenizer: Tokenizer = TOKENIZERS[record.kind].load(folder, record.name)
    require(
        tokenizer.fingerprint == record.fingerprint,
        f"the tokenizer in {folder} is not {record.describe()} as {RECORD} says, but "
        f"{TokenizerRecord.of(tokenizer).describe()}: a file was changed; copy it anew",
    )
    return tokenizer


def read_record(folder: pathlib.Path) -> TokenizerRecord:
    """Reads the record of the tokenizer that was copied to `folder`.

    Raises:
      UserError: if there is no record, or it is damaged.
    """
    path = folder / RECORD
    values = parse_object(str(path), read_text(path))
    fields = {field.name: field.type for field in dataclasses.fields(TokenizerRecord)}
    known = set(values) == set(fields) and all(isinstance(values[name], fields[name]) for name in fields)  # type: ignore[arg-type]
    require(known, f"{path} must hold {comma_list(fields)}; it holds {comma_list(values)}")
    return TokenizerRecord(**values)

"""Reads the small text files that describe a tokenizer, with one-line errors."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from anyexperts_jax.core.errors import UserError, require


def read_text(path: pathlib.Path) -> str:
    """Reads a UTF-8 file.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def parse_object(name: str, text: str) -> dict[str, Any]:
    """Parses a JSON object; `name` is for error messages.

    Raises:
      UserError: if `text` is not a JSON object.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error
    require(isinstance(value, dict), f"{name} holds no JSON object, but a {type(value).__name__}")
    return value


def as_text(value: Mapping[str, Any]) -> str:
    """Formats JSON as in the files of a tokenizer."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

"""Reading the small text files that describe a tokenizer, with errors of one line."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from anyexperts_jax.core.errors import UserError, require


def read_text(path: pathlib.Path) -> str:
    """The text of a UTF-8 file.

    Raises:
      UserError: when it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def parse_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object that `text` holds; `name` is for messages.

    Raises:
      UserError: when it holds none.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error
    require(isinstance(value, dict), f"{name} holds no JSON object, but a {type(value).__name__}")
    return value


def as_text(value: Mapping[str, Any]) -> str:
    """As JSON, as the files of a tokenizer are written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

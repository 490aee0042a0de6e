"""Paths and text files that users name. Whatever is wrong with one ends in one line that names it."""

import json
import os
import pathlib
import re
from typing import Any

from anyexperts_jax.core.errors import UserError, require

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # two letters at least: "C:/" is a drive
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")


def require_local(path: str | os.PathLike[str], what: str) -> pathlib.Path:
    """`path`, once it is known to mean a place in the file system of this machine.

    `pathlib` makes the relative folder "gs:" of "gs://bucket/run", so the address of an object store would work and
    leave its files in the wrong place.

    Args:
      what: names the path in the message, as in "run directory".

    Raises:
      UserError: for the address of an object store or of anything else with a scheme, and for a NUL character.
    """
    text = os.fspath(path)
    require("\0" not in text, f"{what} {text!r} has a NUL character in it; no file system takes that")
    scheme = _SCHEME.match(text)
    if scheme:
        address = f"{scheme[0]}/{text[scheme.end() :].lstrip('/')}"
        raise UserError(
            f"{what} {address}: object stores and other addresses are not supported; give a path on this machine "
            f"(if {scheme[1]}: is a folder here, give its absolute path)"
        )
    return pathlib.Path(path)


def require_printable(path: pathlib.Path, what: str) -> None:
    """Refuses a name for something new that no message could show in one line, or that is no text.

    Raises:
      UserError: when a part of the absolute path has control characters (a newline, a tab) or is not UTF-8.
    """
    text = str(path.absolute())
    clean = not _CONTROL.search(text) and not any("\ud800" <= character <= "\udfff" for character in text)
    require(clean, f"{what} {text!r} has control characters or bytes that are not UTF-8 in its path; give another name")


def read_text(path: pathlib.Path, what: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Args:
      what: names the file in messages, as in "config".

    Raises:
      UserError: when it cannot be read or is not UTF-8.
    """
    require_local(path, what)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = "it looks like UTF-16" if data.startswith(_BYTE_ORDER_MARKS) else f"byte {error.start} is not"
        raise UserError(f"{what} {path} is not UTF-8 text ({found}); save it as UTF-8") from error


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text; `name` begins the message.

    Raises:
      UserError: when it is not JSON, or is nested too deeply or has numbers too long to read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {error}") from error


def parse_json_object(text: str, name: str) -> dict[str, Any]:
    """The same, of a text that must be a JSON object.

    Raises:
      UserError: as `parse_json`, or when it is a number, a list or another value.
    """
    values = parse_json(text, name)
    require(isinstance(values, dict), f"{name}: not a JSON object")
    return values

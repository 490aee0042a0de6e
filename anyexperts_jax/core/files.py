"""Paths and text files given by users. Every fault in one becomes a one-line error that names it."""

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
    """Checks that `path` is a path in this machine's file system and returns it.

    `pathlib` reads "gs://bucket/run" as a relative path with a folder "gs:", so without the check an object store's
    address would be accepted and the files written to the wrong place.

    Args:
      what: the kind of path, for the message: "run directory".

    Raises:
      UserError: for the address of an object store or anything else with a scheme, and for a NUL character.
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
    """Checks that the path of something new can be printed on one line.

    Raises:
      UserError: if the absolute path has control characters (a newline, a tab) or is not UTF-8.
    """
    text = str(path.absolute())
    clean = not _CONTROL.search(text) and not any("\ud800" <= character <= "\udfff" for character in text)
    require(clean, f"{what} {text!r} has control characters or bytes that are not UTF-8 in its path; give another name")


def read_text(path: pathlib.Path, what: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Args:
      what: the kind of file, for messages: "config".

    Raises:
      UserError: if it cannot be read or is not UTF-8.
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
    """Parses a JSON text; `name` begins the message of an error.

    Raises:
      UserError: if it is not JSON, is nested too deeply or has numbers that are too long.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {error}") from error


def parse_json_object(text: str, name: str) -> dict[str, Any]:
    """Parses a text that must be a JSON object.

    Raises:
      UserError: like `parse_json`, and also if the text is a number, a list or another value.
    """
    values = parse_json(text, name)
    require(isinstance(values, dict), f"{name}: not a JSON object")
    return values

"""Parses the files of block sizes by device, with clear errors for a broken file."""

import json
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from anyexperts_jax.core.errors import UserError, comma_list, require

Entry = TypeVar("Entry")


def parse_entries(
    text: str, file: str, device: str, known: Collection[str], entry: Callable[[str, Any], Entry], remedy: str
) -> dict[str, tuple[Entry, ...]]:
    """The entries by device name, in the file's order.

    Args:
      device: the word for a device, such as "chip". The file lists its entries under the plural, "chips".
      entry: makes an entry of (name, fields), or raises `UserError`.
      remedy: what to do about a broken file, for the message.

    Raises:
      UserError: if the file is not JSON or lacks that field, or for an unknown device name.
    """
    try:
        devices = json.loads(text)[f"{device}s"]
        rows = [(name, fields) for name, entries in devices.items() for fields in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds no table ({type(error).__name__}: {error}); {remedy}") from error
    for name in devices:
        require(name in known, f"{file}: {device}={name!r} is unknown; valid: {comma_list(known)}; {remedy}")
    table: dict[str, tuple[Entry, ...]] = {}
    for name, fields in rows:
        table[name] = (*table.get(name, ()), entry(name, fields))
    return table

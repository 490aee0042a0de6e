"""Errors a user can cause. Each message is one line: what, where, what to do."""

from collections.abc import Collection, Iterable
from typing import Any


class UserError(ValueError):
    """A wrong value, file or option. The command line prints the message without a traceback and exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_one_of(name: str, value: Any, valid: Collection[Any]) -> None:
    """Raises `UserError` naming the value and the valid ones unless `value` is among them."""
    if value not in list(valid):  # a list: what cannot be hashed is no member either
        raise UserError(f"{name}={value!r} is unknown; valid: {comma_list(valid)}")


def shown(value: Any) -> str:
    """A value as Python writes it, without the middle where it is long: for messages of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:70]}...{text[-20:]}"


def comma_list(values: Iterable[Any]) -> str:
    return ", ".join(str(v) for v in values)

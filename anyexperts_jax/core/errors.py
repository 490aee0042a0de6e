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
    """Raises `UserError`, listing the valid values, unless `value` is one of them."""
    if value not in list(valid):  # in a list, because `value` may not be hashable
        raise UserError(f"{name}={value!r} is unknown; valid: {comma_list(valid)}")


def one_line(text: object, most: int | None = None) -> str:
    """The text of an error or any other value on one line, cut after `most` characters."""
    return " ".join(str(text).split())[:most]


def shown(value: Any) -> str:
    """The `repr` of a value for one-line messages: long ones are shortened in the middle."""
    text = one_line(repr(value))
    return text if len(text) <= 100 else f"{text[:70]}...{text[-20:]}"


def comma_list(values: Iterable[Any]) -> str:
    return ", ".join(str(v) for v in values)

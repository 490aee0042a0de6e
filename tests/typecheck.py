"""The run-time type checker that conftest.py's import hook puts on every annotated function of the package."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_CONF = BeartypeConf(is_pep484_tower=True)  # an int passes for a float, as type checkers have it


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks a function's arguments and result, except in config modules: configs refuse bad values themselves, with a
    `UserError`, and tests must see that one."""
    if function.__module__.endswith(("config", "switches", "execution")):
        return function
    return beartype(conf=_CONF)(function)


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without this check, which refuses wrong types and shapes before the function can."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function

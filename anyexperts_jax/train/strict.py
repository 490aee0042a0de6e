"""Nested dictionaries to frozen dataclasses and back, refusing whatever does not fit."""

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

import dacite

from anyexperts_jax.core.errors import UserError, comma_list

Config = TypeVar("Config")


def build(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass `cls` from nested `values`; fields left out take their defaults.

    TOML has no null: "none" stands for None where a field allows it.

    Raises:
      UserError: one line naming the dotted key that is unknown (with the closest valid one), missing or of the
        wrong type, or what the dataclass's own checks say.
    """
    values = _known(cls, values, "")
    hooks: dict[type[Any], Callable[[Any], Any]] = {float: _exact_float, int: _not_a_bool}
    try:
        return dacite.from_dict(cls, values, dacite.Config(cast=[tuple], type_hooks=hooks, strict=True))
    except dacite.MissingValueError as error:
        raise UserError(f"key {error.field_path} is missing") from error
    except dacite.WrongTypeError as error:
        expected = getattr(error.field_type, "__name__", str(error.field_type))
        if expected == "Literal":
            expected = f"one of {comma_list(get_args(error.field_type))}"
        raise UserError(f"key {error.field_path}={error.value!r} must be {expected}") from error


def flatten(config: Any) -> dict[str, Any]:
    """The leaves of a nested dataclass by dotted key."""
    return dict(_leaves(config, ""))


def differing_keys(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """The dotted keys where two configs differ, with both values."""
    left, right = flatten(ours), flatten(theirs)
    keys = dict.fromkeys([*left, *right])
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top` laid over it, table by table."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def closest(name: str, valid: list[str]) -> str:
    """How to go on from a misspelt `name`: the nearest valid one if there is one, and all of them."""
    near = difflib.get_close_matches(name, valid, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"valid: {comma_list(valid)}"


def _known(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """`values` with "none" read as None, once every key is known to be a field."""
    hints = get_type_hints(cls)
    valid = [field.name for field in dataclasses.fields(cls)]
    known = {}
    for key, value in values.items():
        if key not in valid:
            raise UserError(f"unknown key {prefix}{key}; {closest(key, valid)}")
        table = _dataclass_in(hints[key])
        if table is not None and isinstance(value, Mapping):
            value = _known(table, value, f"{prefix}{key}.")
        elif table is not None and isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            value = [_known(table, item, f"{prefix}{key}[{i}].") for i, item in enumerate(value)]
        known[key] = None if value == "none" and type(None) in get_args(hints[key]) else value
    return known


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that `hint` is, or allows besides None."""
    return next((option for option in (hint, *get_args(hint)) if dataclasses.is_dataclass(option)), None)  # type: ignore[return-value]


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _exact_float(value: Any) -> Any:
    """Whole numbers stand for floats; whatever else is no float stays as it is and is refused."""
    return float(value) if type(value) is int else value


def _not_a_bool(value: Any) -> Any:
    """Python's bool is an int; in a config it is a mistake. As a string it is refused with its name."""
    return str(value) if isinstance(value, bool) else value

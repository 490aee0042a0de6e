"""Converts nested dictionaries to frozen dataclasses and back, strictly."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import dacite

from anyexperts_jax.core.checks import broken_rule, field_types, type_name, without_none
from anyexperts_jax.core.errors import UserError, comma_list, require, shown

Config = TypeVar("Config")


def build(cls: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Builds the dataclass `cls` from nested `values`; missing fields get their defaults.

    TOML has no null, so "none" means None if a field allows it. A single value is accepted for a list of one. `prefix`
    is put before every key in messages.

    Raises:
      UserError: one line naming the dotted key that is unknown (with the closest valid one), missing or of the wrong
        type, or the message of the dataclass's own checks.
    """
    prepared = _prepare_table(cls, values, prefix)
    try:
        return dacite.from_dict(cls, prepared, dacite.Config(strict=True))
    except dacite.MissingValueError as error:
        raise UserError(f"key {prefix}{error.field_path} is missing") from error


def flatten(config: Any) -> dict[str, Any]:
    """The leaves of a nested dataclass by dotted key."""
    return dict(_leaves(config, ""))


def differing_keys(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """The dotted keys where two configs differ, with both values."""
    left, right = flatten(ours), flatten(theirs)
    keys = dict.fromkeys([*left, *right])
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by the values of `top`, table by table."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def closest(name: str, valid: list[str]) -> str:
    """A hint for a misspelt `name`: the closest valid name if there is one, and the list of all."""
    near = difflib.get_close_matches(name, valid, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"valid: {comma_list(valid)}"


def _prepare_table(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Converts `values` to the types of the fields of `cls`, with nested tables as dictionaries; checks every key."""
    hints = field_types(cls)
    prepared = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"unknown key {prefix}{key}; {closest(key, list(hints))}")
        prepared[key] = _prepare(hints[key], value, f"{prefix}{key}")
    return prepared


def _prepare(hint: Any, value: Any, key: str) -> Any:
    """Converts `value` to the type `hint`.

    Raises:
      UserError: naming the key if `value` is not of that type.
    """
    kind, optional = without_none(hint)
    if optional and (value is None or value == "none"):
        return None
    if dataclasses.is_dataclass(kind):
        names = comma_list(field.name for field in dataclasses.fields(kind))
        require(isinstance(value, Mapping), f"key {key}={shown(value)} must be {type_name(hint)}: a table of {names}")
        return _prepare_table(kind, value, f"{key}.")  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        require(not isinstance(value, Mapping), f"key {key}={shown(value)} must be {type_name(hint)}")
        item = get_args(kind)[0]
        if not isinstance(value, list | tuple):
            return (_prepare(item, value, key),)
        return tuple(_prepare(item, each, f"{key}[{index}]") for index, each in enumerate(value))
    rule = broken_rule(kind, value)
    if rule is not None:
        wanted = rule if get_origin(kind) is Literal else f"{type_name(hint)}: {rule}"
        raise UserError(f"key {key}={shown(value)} must be {wanted}")
    return float(value) if kind is float else value


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value

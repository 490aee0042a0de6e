"""Reads configuration files and overrides into nested tables."""

import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from typing import Any

from anyexperts_jax.core.errors import UserError, require, shown
from anyexperts_jax.core.files import read_text
from anyexperts_jax.train.moved import move_keys
from anyexperts_jax.train.strict import closest, merge


def read_toml(source: str | pathlib.Path, kind: str, presets: Traversable) -> tuple[str, dict[str, Any]]:
    """The name (for messages) and the raw values of a TOML file, or of a preset in the folder `presets`."""
    path = pathlib.Path(source)
    if path.suffix == ".toml":
        return str(path), parse_toml(str(path), read_text(path, "config"))
    known = names_in(presets)
    if str(source) not in known:
        raise UserError(f"no {kind} {str(source)!r}; {closest(str(source), known)}, or a path to a .toml file or a run")
    return f"config {source}", parse_toml(f"config {source}", (presets / f"{source}.toml").read_text())


def names_in(presets: Traversable) -> list[str]:
    """The names of the TOML files in a folder of the package."""
    return sorted(path.name.removesuffix(".toml") for path in presets.iterdir() if path.name.endswith(".toml"))


def parse_toml(name: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid TOML: {error}") from error


def parse_override(override: str) -> dict[str, Any]:
    """Parses one "key=value" into a nested table. A value that is not valid TOML is a string."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    require(bool(equals) and all(parts), f"override {shown(override)} is not key=value, as in optim.lr=1e-3")
    value: Any = text.strip()
    require("\n" not in value, f"override {shown(override)} has several lines; give one key=value each")
    try:
        value = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    except (ValueError, RecursionError) as error:
        raise UserError(f"override {key.strip()}: {error}") from error
    for part in reversed(parts):
        value = {part: value}
    return value


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with every "key=value" applied in order. Keys of earlier versions are moved to their current place."""
    for override in overrides:
        values = merge(values, move_keys(parse_override(override)))
    return dict(values)


def table_in(values: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    """The table `key` of a file's values, empty if there is none; `name` is the file's, for the message.

    Raises:
      UserError: if the key holds something other than a table.
    """
    table = values.get(key, {})
    require(isinstance(table, Mapping), f"{name}: key {key}={shown(table)} must be a table")
    return table

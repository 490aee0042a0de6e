"""The reference of configuration keys: type, default and meaning of each, and a TOML file with them as comments."""

import dataclasses
import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from anyexperts_jax.core.checks import field_types, type_name, without_none
from anyexperts_jax.core.errors import UserError, comma_list
from anyexperts_jax.core.field_docs import class_summary, field_docs

WIDTH = 80  # width of a comment


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a configuration file."""

    name: str  # dotted
    type: str  # such as "int", "float or none", "list of str", "add | off"
    default: Any  # the value if a file does not have the key
    meaning: str


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of a configuration file: its keys and the tables in it."""

    name: str  # dotted; "" for the top of the file
    optional: bool  # whether it may be replaced by "none"
    meaning: str
    keys: tuple[Key, ...]
    tables: tuple["Table", ...]

    def every_key(self) -> Iterator[Key]:
        yield from self.keys
        for table in self.tables:
            yield from table.every_key()


def describe(default: Any, name: str = "", meaning: str = "", optional: bool = False) -> Table:
    """The table of a configuration's dataclass; `default` is the configuration of an empty file."""
    cls: Any = type(default)
    docs, keys, tables = field_docs(cls), [], []
    for field, hint in field_types(cls).items():
        kind, may_be_none = without_none(hint)
        dotted, value = f"{name}.{field}".lstrip("."), getattr(default, field)
        if dataclasses.is_dataclass(kind):
            make: Any = kind
            inside = make() if value is None else value
            said = [text for text in (class_summary(type(inside)), docs.get(field)) if text]
            tables.append(describe(inside, dotted, _in_a_file(". ".join(said)), may_be_none))
        else:
            keys.append(Key(dotted, type_name(hint), value, _in_a_file(docs.get(field, ""))))
    return Table(name, optional, meaning, tuple(keys), tuple(tables))


def to_toml(parts: Sequence[tuple[Any, Table]], only: Sequence[str] = ()) -> str:
    """The TOML file of one or several configurations, with the meaning of every key. It reads back as the same values.

    Args:
      only: names of keys or tables to include; empty: everything.

    Raises:
      UserError: for a name that is neither.
    """
    names = [key.name for _, table in parts for key in table.every_key()]
    names += {name.rpartition(".")[0] for name in names} - {""}
    for prefix in only:
        if prefix not in names:
            near = difflib.get_close_matches(prefix, names, n=3)
            nearest = f"near: {comma_list(near)}; " if near else ""
            raise UserError(f"no key or table {prefix}; {nearest}`anyexperts config` lists all")
    blocks = [block for config, table in parts for block in _toml_tables(config, table, tuple(only))]
    return "\n\n".join(blocks) + "\n"


def toml_value(value: Any) -> str:
    """The value in TOML syntax; None, which TOML lacks, becomes "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _in_a_file(text: str) -> str:
    """The text with None spelled as in a TOML file."""
    return re.sub(r"\bNone\b", "none", text)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _toml_tables(config: Any, table: Table, only: tuple[str, ...]) -> Iterator[str]:
    """The blocks of the file, one for the keys of each table."""
    lines = []
    for key in table.keys:
        if not only or any(_under(key.name, prefix) for prefix in only):
            field = key.name.rpartition(".")[2]
            said = f"{key.meaning} [{key.type}; default {toml_value(key.default)}]"
            lines += [*_comment(said), f"{field} = {toml_value(getattr(config, field))}"]
    inside = [(part, getattr(config, part.name.rpartition(".")[2])) for part in table.tables]
    for part, value in inside:
        if value is None and (not only or any(_under(part.name, prefix) for prefix in only)):
            lines += [*_comment(f"{part.meaning} [a table or none]"), f'{part.name.rpartition(".")[2]} = "none"']
    if lines:
        header = [*_comment(table.meaning), f"[{table.name}]"] if table.name else []
        yield "\n".join([*header, *lines])
    for part, value in inside:
        if value is not None:
            yield from _toml_tables(value, part, only)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)

"""`Registry`: named things of one kind that the configuration refers to, and to which users add their own."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

from anyexperts_jax.core.errors import UserError, require, require_one_of
from anyexperts_jax.core.users_code import import_users

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind, such as routers or dispatchers.

    An entry is the thing itself or "module:attribute", imported on first use, so that a kernel's compiler or an
    optional package loads only when it is needed. A user's package adds an entry when it is imported, and
    `--plugin my_package` imports it before the configuration is read:

        from anyexperts_jax import DISPATCHERS
        DISPATCHERS.register("mine", my_dispatcher)
    """

    def __init__(self, kind: str, entries: Mapping[str, T | str]) -> None:
        self.kind = kind  # what the entries are, as messages call them
        self._entries: dict[str, T | str] = dict(entries)

    def register(self, name: str, entry: T | str) -> None:
        """Adds an entry under a new name.

        Raises:
          UserError: if the name belongs to another entry.
        """
        taken = name in self._entries and self._entries[name] is not entry
        require(not taken, f"{self.kind} {name!r} is registered already; choose another name")
        self._entries[name] = entry

    def check(self, field: str, name: Any) -> None:
        """Raises `UserError`, with `field` and the registered names, unless `name` is registered."""
        require_one_of(field, name, self.names())

    def names(self) -> tuple[str, ...]:
        """The names of all entries, in the order of registration."""
        return tuple(self._entries)

    def __getitem__(self, name: Any) -> T:
        """The entry of that name, imported if need be.

        Raises:
          UserError: for an unknown name, or an entry whose module is missing or does not define it.
        """
        self.check(self.kind, name)
        entry = self._entries[name]
        return cast(T, self._load(name, entry) if isinstance(entry, str) else entry)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _load(self, name: str, where: str) -> object:
        module_name, _, attribute = where.partition(":")
        try:
            module = _imported(module_name, f"{self.kind} {name!r} fails")
        except ModuleNotFoundError as error:
            raise UserError(f"{self.kind} {name!r} cannot be loaded from {where}: {error}") from error
        require(hasattr(module, attribute), f"{self.kind} {name!r}: module {module_name} defines no {attribute!r}")
        return getattr(module, attribute)


def _imported(module: str, what: str) -> ModuleType:
    """Imports a module. An error in one of ours is a bug and keeps its traceback; one in a user's becomes one line."""
    ours = module.partition(".")[0] == __name__.partition(".")[0]
    return importlib.import_module(module) if ours else import_users(module, what)


def registers(registry: Registry[T], name: str) -> Callable[[T], T]:
    """A decorator that registers an object under `name` and returns it unchanged."""

    def register(entry: T) -> T:
        registry.register(name, entry)
        return entry

    return register

"""Which implementation of an op runs."""

from collections.abc import Mapping
from typing import TypeVar

from anyexperts_jax.core.errors import require_one_of

T = TypeVar("T")


def select_implementation(name: str | None, implementations: Mapping[str, T], default: str) -> T:
    """The implementation asked for by name, or the default where `name` is None.

    Raises:
      UserError: the op has no implementation of that name; the message lists those it has.
    """
    chosen = default if name is None else name
    require_one_of("implementation", chosen, list(implementations))
    return implementations[chosen]

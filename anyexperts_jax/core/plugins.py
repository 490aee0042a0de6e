"""Plugins: modules of the user that are imported before a run, so that they can add to the registries."""

import sys
from collections.abc import Iterable

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.users_code import import_users


def load_plugins(modules: Iterable[str]) -> None:
    """Imports each module; the current directory is searched too.

    Raises:
      UserError: for a module that does not exist or that raises an error on import; the message has its file and line.
    """
    for name in modules:
        if name in sys.modules:
            continue
        dotted = all(part.isidentifier() for part in name.split("."))
        require(dotted, f"plugin {name!r} is not a module name; give a dotted name such as my_package.routers")
        sys.path.append("")  # the current directory: unlike `python -m`, an installed command does not search it
        try:
            import_users(name, f"plugin {name!r} fails")
        except ModuleNotFoundError as error:
            missing = f"plugin {name!r} cannot be imported: {error}"
            raise UserError(f"{missing}; start the command in its folder, or install it") from error
        finally:
            sys.path.remove("")

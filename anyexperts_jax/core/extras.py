"""Packages that only an extra of this one installs."""

import importlib
from typing import Any

from anyexperts_jax.core.errors import UserError


def require_package(name: str, extra: str, who: str = "this needs") -> Any:
    """Imports a package that comes with an extra.

    Args:
      who: the subject and verb of the message: "reading Parquet needs".

    Raises:
      UserError: if it is not installed, saying how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{who} the package {name}: pip install 'anyexperts-jax[{extra}]'") from error

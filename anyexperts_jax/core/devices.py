"""Checks that JAX has a device to run on."""

import jax

from anyexperts_jax.core.errors import UserError, one_line


def require_devices() -> None:
    """Starts JAX's backend now, so that a missing device gives one clear error instead of many obscure ones later.

    Raises:
      UserError: when JAX finds no device of the requested platforms, as with JAX_PLATFORMS=cuda without a GPU.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an AssertionError if the platform's plugin is not installed
        asked = jax.config.values["jax_platforms"]
        said = one_line(error).partition(" (set JAX_PLATFORMS=")[0]
        raise UserError(
            f"JAX finds no device of JAX_PLATFORMS={asked}{f' ({said})' if said else ''}; "
            "unset it to run on what is here, or install that platform's JAX"
        ) from error

"""Whether JAX has a device to run on."""

import jax

from anyexperts_jax.core.errors import UserError


def require_devices() -> None:
    """Starts JAX's backend, for errors that every later call would raise in words of its own.

    Raises:
      UserError: when JAX finds no device of the platforms it was told, as in JAX_PLATFORMS=cuda without a GPU.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is one, where a plug-in is not installed
        asked = jax.config.jax_platforms
        said = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS=")[0]
        raise UserError(
            f"JAX finds no device of JAX_PLATFORMS={asked}{f' ({said})' if said else ''}; "
            "unset it to run on what is here, or install that platform's JAX"
        ) from error

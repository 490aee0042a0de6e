"""Checks that JAX has a device to run on."""

import jax

from anyexperts_jax.core.errors import UserError, one_line

_EXTRAS = {"cuda": "cuda13", "gpu": "cuda13", "tpu": "tpu"}  # by JAX's name of the platform


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
        extras = [_EXTRAS[name] for name in str(asked).split(",") if name in _EXTRAS]
        install = f"pip install 'anyexperts-jax[{extras[0]}]'" if extras else "correct it"
        raise UserError(
            f"JAX finds no device of JAX_PLATFORMS={asked}{f' ({said})' if said else ''}; "
            f"unset it to run on what is here, or {install}"
        ) from error

"""Checks that the TPU compiler, libtpu, is installed and fits the installed JAX.

JAX writes programs in a format for its own release of libtpu. With another release, small programs compile, but larger
ones end in an internal XLA error after minutes.
"""

import importlib.metadata
import importlib.util
import re

from anyexperts_jax.core.errors import require

NO_LIBTPU = "libtpu is not installed; in a checkout, pip install -e '.[aot]' (Linux only)"
# Other releases, by JAX's first two version numbers, that compiled every kernel and step of experiments/results.
_ALSO_FIT = {"0.12": ("0.0.52",)}
_PIN = re.compile(r"libtpu==(\d+(?:\.\d+)*)(?:\.\*)?\s*;.*\btpu\b")


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def require_libtpu() -> None:
    """Raises `UserError` unless libtpu is installed and fits JAX."""
    require(has_libtpu(), NO_LIBTPU)
    found, jax = importlib.metadata.version("libtpu"), importlib.metadata.version("jax")
    own = own_release(importlib.metadata.requires("jax") or [])
    fitting = (*((own,) if own else ()), *_ALSO_FIT.get(".".join(jax.split(".")[:2]), ()))
    require(
        own is None or any(found == release or found.startswith(f"{release}.") for release in fitting),
        f"libtpu {found} does not fit JAX {jax}, whose own is {own}: a compile would end in an internal error of "
        f"XLA's; pip install 'libtpu=={own}.*'",
    )


def own_release(requirements: list[str]) -> str | None:
    """The libtpu release that JAX's requirements pin, such as "0.0.42"; None if they pin none."""
    pins = [pin[1] for pin in map(_PIN.match, requirements) if pin]
    return pins[0] if pins else None

"""The software and device that produced a result."""

import importlib.metadata
import platform

import jax

from anyexperts_jax.core.devices import require_devices

_PACKAGES = ("anyexperts-jax", "jax", "jaxlib", "flax", "optax", "grain", "numpy")


def device_text() -> str:
    require_devices()
    device = jax.devices()[0]
    return device.device_kind if device.platform in device.device_kind else f"{device.device_kind} ({device.platform})"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect a result. Packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

"""Finds the GPU that a trace is for, and raises if the kernels cannot run there."""

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.hardware import gpu_limits
from anyexperts_jax.ops._select import device_kind, is_nvidia, platform


def gpu_kind() -> str | None:
    """The device kind of the GPU that the current trace is for: that of the mesh in use, else of the default backend.

    None if that is not a GPU.
    """
    return device_kind() if platform() == "gpu" else None


def is_hopper(kind: str | None) -> bool:
    """Whether a GPU has compute capability 9.0. Decided by its name, all that is known when compiling without one."""
    return gpu_limits(kind).wgmma


def require_nvidia(implementation: str) -> None:
    """Raises `UserError` unless the current trace is for an NVIDIA GPU."""
    kind = gpu_kind()
    here = kind or platform()
    message = f"implementation={implementation!r} needs an NVIDIA GPU and this runs on {here}; use implementation='xla'"
    require(is_nvidia(kind), message)


def require_hopper(implementation: str) -> None:
    """Raises `UserError` unless the current trace is for a Hopper GPU."""
    kind = gpu_kind()
    here, instead = kind or platform(), "pallas_triton" if is_nvidia(kind) else "xla"
    require(
        is_hopper(kind),
        f"implementation={implementation!r} needs a Hopper GPU and this runs on {here}; use implementation={instead!r}",
    )

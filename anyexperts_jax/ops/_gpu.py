"""Which GPU a trace is for, and the refusal where there is none."""

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.hardware import gpu_limits
from anyexperts_jax.ops._select import device_kind, is_nvidia, platform


def gpu_kind() -> str | None:
    """The device kind of the GPU that a trace made now will run on: of the mesh in use, else of the default backend.

    None where that is no GPU.
    """
    return device_kind() if platform() == "gpu" else None


def is_hopper(kind: str | None) -> bool:
    """True for the GPUs of compute capability 9.0, known by name: a deviceless compile knows no more of them."""
    return gpu_limits(kind).wgmma


def require_nvidia(implementation: str) -> None:
    """Raises `UserError` unless traces are for an NVIDIA GPU."""
    kind = gpu_kind()
    here = kind or platform()
    message = f"implementation={implementation!r} needs an NVIDIA GPU and this runs on {here}; use implementation='xla'"
    require(is_nvidia(kind), message)


def require_hopper(implementation: str) -> None:
    """Raises `UserError` unless traces are for a Hopper GPU."""
    kind = gpu_kind()
    here, instead = kind or platform(), "pallas_triton" if is_nvidia(kind) else "xla"
    require(
        is_hopper(kind),
        f"implementation={implementation!r} needs a Hopper GPU and this runs on {here}; use implementation={instead!r}",
    )

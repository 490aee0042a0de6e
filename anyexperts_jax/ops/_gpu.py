"""Which GPU a trace is for, and the refusal where there is none."""

import jax
import jax.numpy as jnp

from anyexperts_jax.core.errors import require

KERNEL_DTYPES = (jnp.bfloat16, jnp.float32)
_HOPPER = ("H100", "H200", "H800", "H20")  # GH200 contains H200


def gpu_kind() -> str | None:
    """The device kind of the GPU that a trace made now will run on: of the mesh in use, else of the default backend.

    None where that is no GPU.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.device_kind if abstract.platform == "gpu" else None
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else None


def is_hopper(kind: str | None) -> bool:
    """True for the GPUs of compute capability 9.0, known by name: a deviceless compile knows no more of them."""
    return kind is not None and any(name in kind for name in _HOPPER)


def require_runnable(implementation: str, dtype: jnp.dtype, *, hopper: bool) -> None:
    """Raises `UserError` unless a GPU that can run the kernels is in use and they take `dtype`."""
    kind = gpu_kind()
    if hopper:
        runs, needs = is_hopper(kind), "a Hopper GPU (H100, H200)"
    else:
        runs, needs = kind is not None and kind.startswith(("NVIDIA", "Tesla")), "an NVIDIA GPU"
    here, instead = kind or jax.default_backend(), "'pallas_triton' or 'xla'" if hopper and kind else "'xla'"
    require(runs, f"implementation={implementation!r} needs {needs} and this runs on {here}; use {instead}")
    require_dtype(implementation, dtype)


def require_dtype(implementation: str, dtype: jnp.dtype) -> None:
    """Raises `UserError` unless the kernels take `dtype`."""
    names = " and ".join(jnp.dtype(d).name for d in KERNEL_DTYPES)
    require(
        dtype in KERNEL_DTYPES, f"implementation={implementation!r} takes {names}, x is {dtype}; cast it or use 'xla'"
    )

"""Which implementation of an op runs."""

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from anyexperts_jax.core.errors import require_one_of

T = TypeVar("T")


def select_implementation(name: str | None, implementations: Mapping[str, T], default: str) -> T:
    """The implementation asked for by name, or the default where `name` is None.

    Raises:
      UserError: the op has no implementation of that name; the message lists those it has.
    """
    chosen = default if name is None else name
    require_one_of("implementation", chosen, list(implementations))
    return implementations[chosen]


def platform() -> str:
    """Where the computation will run: the platform of the mesh in use, if it names one (a mesh of a topology compiled
    for without its devices does), else that of JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The kind of device the computation will run on, found as `platform` is."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def is_nvidia(kind: str | None) -> bool:
    """True for the names NVIDIA gives its GPUs."""
    return kind is not None and kind.startswith(("NVIDIA", "Tesla", "Quadro"))


def sees_one_device() -> bool:
    """Whether the current trace sees a single device: no mesh is in use, or one of one device, or a `shard_map` runs
    over the whole mesh. Arrays that are split over several devices need a mesh in use or a `Placement`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or all(kind == AxisType.Manual for kind in mesh.axis_types)


def default_implementation(dtype: jnp.dtype) -> str:
    """The kernels of the device in use where they take the dtype, else XLA: `implementation_for` what a trace sees."""
    if not sees_one_device():
        return "xla"  # which alone cuts an op into parts for several devices
    return implementation_for(platform(), device_kind(), dtype)


def implementation_for(platform: str, device_kind: str, dtype: jnp.dtype) -> str:
    """The kernels of a TPU or an NVIDIA GPU where they take the dtype, else "xla"."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return "xla"
    if platform == "tpu":
        return "pallas_tpu"
    return "pallas_triton" if platform == "gpu" and is_nvidia(device_kind) else "xla"

"""Selects the implementation of an op for the platform and dtype."""

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from anyexperts_jax.core.errors import require_one_of

T = TypeVar("T")


def select_implementation(name: str | None, implementations: Mapping[str, T], default: str) -> T:
    """The implementation called `name`, or the default if `name` is None.

    Raises:
      UserError: for an unknown name; the message lists the op's implementations.
    """
    chosen = default if name is None else name
    require_one_of("implementation", chosen, list(implementations))
    return implementations[chosen]


def platform() -> str:
    """The platform the computation will run on: that of the mesh in use if it names one, else JAX's default backend.

    A mesh names its platform when a topology is compiled for without its devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The kind of device the computation will run on; see `platform`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def is_nvidia(kind: str | None) -> bool:
    """Whether a device kind is an NVIDIA GPU, by its name."""
    return kind is not None and kind.startswith(("NVIDIA", "Tesla", "Quadro"))


def sees_one_device() -> bool:
    """Whether the current trace sees a single device: no mesh is in use, it has one device, or a `shard_map` runs over
    all of its axes. Arrays that are split over several devices need a mesh in use or a `Placement`."""
    mesh = jax.sharding.get_abstract_mesh()
    # In a `shard_map` every axis is manual and shapes are those of one device's shard, as a kernel needs them.
    return mesh.empty or mesh.size == 1 or all(kind == AxisType.Manual for kind in mesh.axis_types)


def default_implementation(dtype: jnp.dtype) -> str:
    """`implementation_for` the device and dtype that the current trace is for."""
    if not sees_one_device():
        return "xla"  # the partitioner can split XLA's own ops over devices, but not a Pallas call
    return implementation_for(platform(), device_kind(), dtype)


def implementation_for(platform: str, device_kind: str, dtype: jnp.dtype) -> str:
    """The Pallas kernels of a TPU or an NVIDIA GPU if they support the dtype, else "xla"."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return "xla"
    if platform == "tpu":
        return "pallas_tpu"
    return "pallas_triton" if platform == "gpu" and is_nvidia(device_kind) else "xla"

"""The device mesh. It always has five named axes, most of which usually have size 1."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.errors import comma_list, require

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis. At most one may be -1, which takes the devices left over.

    With several slices (TPU slices or GPU nodes, connected by the data-centre network) the five sizes describe one
    slice, and `dcn_data` and `dcn_fsdp` count the slices along these axes. The mesh axis `data` then has
    dcn_data * data devices, and the devices of one slice are adjacent.

    Raises:
      UserError: for a size that is neither -1 nor >= 1, and for more than one -1.
    """

    data: int = -1  # data parallelism: copies of the parameters, each with its share of the batch
    fsdp: int = 1  # splits both parameters and the batch
    expert: int = 1  # expert parallelism: splits both experts and the batch
    tensor: int = 1  # tensor parallelism: splits heads and FFN widths
    sequence: int = 1  # splits the positions of a sequence
    dcn_data: int = 1  # slices along the axis `data`
    dcn_fsdp: int = 1  # slices along the axis `fsdp`

    def __post_init__(self) -> None:
        check_field_types(self, "mesh.")
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            least = "" if name.startswith("dcn_") else ", or -1 for the devices left over"
            require(size >= 1 or (bool(least) and size == -1), f"mesh.{name}={size} must be >= 1{least}")
        free = [name for name, size in sizes.items() if size == -1]
        require(len(free) <= 1, f"mesh axes {comma_list(free)} are all -1; at most one can take the devices left over")

    @property
    def slices(self) -> int:
        return self.dcn_data * self.dcn_fsdp

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The size of every axis on `num_devices` devices, in the order of MESH_AXES.

        Raises:
          UserError: if the product of the sizes is not `num_devices`.
        """
        across = {"data": self.dcn_data, "fsdp": self.dcn_fsdp}
        return {name: size * across.get(name, 1) for name, size in self.sizes_inside(num_devices).items()}

    def sizes_inside(self, num_devices: int) -> dict[str, int]:
        """The size of every axis inside one slice, for `num_devices` devices in all slices together.

        Raises:
          UserError: if the product of the sizes is not `num_devices`.
        """
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        every = {**sizes, "dcn_data": self.dcn_data, "dcn_fsdp": self.dcn_fsdp}
        asked = " x ".join(f"{name}={size}" for name, size in every.items() if size != 1) or "all axes 1"
        fixed = math.prod(size for size in every.values() if size != -1)
        for name, size in sizes.items():
            if size == -1:
                require(num_devices % fixed == 0, f"mesh {asked}: {fixed} does not divide {num_devices} devices")
                sizes[name] = num_devices // fixed
        total = math.prod(sizes.values()) * self.slices
        require(total == num_devices, f"mesh {asked} needs {total} devices, there are {num_devices}")
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, by default all of them. Every mesh has all five axes, so rules need not check for them.

    Raises:
      UserError: if the sizes do not fit the number of devices, or the slices are not those the devices are in.

    Example:
        >>> import anyexperts_jax as ax, jax
        >>> mesh = ax.make_mesh(ax.MeshConfig(data=1), jax.devices()[:1])
        >>> mesh.axis_names
        ('data', 'fsdp', 'expert', 'tensor', 'sequence')
    """
    devices = tuple(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    axis_types = (AxisType.Auto,) * len(sizes)
    if config.slices == 1:
        return Mesh(_device_grid(tuple(sizes.values()), devices), tuple(sizes), axis_types=axis_types)
    across, inside = (config.dcn_data, config.dcn_fsdp), tuple(config.sizes_inside(len(devices)).values())
    blocks = [_device_grid(inside, part) for part in split_into_slices(devices, config.slices)]
    # [dcn_data, dcn_fsdp, data, fsdp, ...] to [dcn_data, data, dcn_fsdp, fsdp, ...]: within an axis, the devices of one
    # slice stay adjacent, so that collectives do as much as possible inside a slice.
    grid = np.stack(blocks).reshape(*across, *inside).transpose((0, 2, 1, 3, 4, 5, 6))
    return Mesh(grid.reshape(tuple(sizes.values())), tuple(sizes), axis_types=axis_types)


def _device_grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of one slice, each mesh axis along a dimension of the torus or a part of one."""
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def traced_for(device: AbstractDevice) -> contextlib.AbstractContextManager[Any]:
    """A context in which `device` is the platform and the only device that traced code sees."""
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def split_into_slices(devices: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """The devices of each of `count` slices. CPU devices have no slices and are divided into equal runs.

    Raises:
      UserError: if the devices are in another number of slices, or in slices of different sizes.
    """
    if devices[0].platform == "cpu":
        size = len(devices) // count
        return [tuple(devices[i * size : (i + 1) * size]) for i in range(count)]
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(slice_of(device), []).append(device)
    parts = [tuple(found[index]) for index in sorted(found)]
    sizes = {len(part) for part in parts}
    require(
        len(parts) == count and len(sizes) == 1,
        f"mesh.dcn_data x mesh.dcn_fsdp = {count}, but the {len(devices)} devices are in {len(parts)} slices of "
        f"{comma_list(map(str, sorted(sizes)))}",
    )
    return parts


def slice_of(device: Any) -> int:
    """The index of the slice that a device is in; 0 if it does not say."""
    return getattr(device, "slice_index", None) or 0

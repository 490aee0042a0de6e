"""The device mesh: five named axes, of which most are 1 most of the time."""

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
    """Devices along each mesh axis. At most one is -1: all devices the others leave.

    Of several slices, TPU slices or GPU nodes between which the data-centre network lies, the five sizes are those in
    one slice, and `dcn_data` and `dcn_fsdp` say how often the slices repeat them: the mesh axis `data` then has
    dcn_data * data devices, those of one slice next to each other.

    Raises:
      UserError: for a size that is neither -1 nor >= 1, and for more than one -1.
    """

    data: int = -1  # copies of the parameters, each with its share of the batch
    fsdp: int = 1  # parameters and the batch both split
    expert: int = 1  # experts and the batch both split
    tensor: int = 1  # heads and FFN widths split
    sequence: int = 1  # positions of a sequence split
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
          UserError: when the sizes do not multiply to `num_devices`.
        """
        across = {"data": self.dcn_data, "fsdp": self.dcn_fsdp}
        return {name: size * across.get(name, 1) for name, size in self.sizes_inside(num_devices).items()}

    def sizes_inside(self, num_devices: int) -> dict[str, int]:
        """The size of every axis inside one slice, of `num_devices` devices in all slices.

        Raises:
          UserError: when the sizes do not multiply to `num_devices`.
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
    """The mesh over `devices`, by default all of them. Every mesh has all five axes, so rules need not ask.

    Raises:
      UserError: sizes that do not fit the devices, or slices that the devices are not.

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
        return Mesh(_near_together(tuple(sizes.values()), devices), tuple(sizes), axis_types=axis_types)
    across, inside = (config.dcn_data, config.dcn_fsdp), tuple(config.sizes_inside(len(devices)).values())
    blocks = [_near_together(inside, part) for part in split_into_slices(devices, config.slices)]
    grid = np.stack(blocks).reshape(*across, *inside).transpose((0, 2, 1, 3, 4, 5, 6))
    return Mesh(grid.reshape(tuple(sizes.values())), tuple(sizes), axis_types=axis_types)


def _near_together(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of one slice, those of an axis along a dimension of the torus, or along a part of one."""
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def traced_for(device: AbstractDevice) -> contextlib.AbstractContextManager[Any]:
    """Within it, code that asks for the platform or the device kind hears of `device`, and that it is the only one."""
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def split_into_slices(devices: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """The devices of each of `count` slices. CPU devices know of no slices and are cut into runs of one length.

    Raises:
      UserError: the devices are in another number of slices, or in slices of unlike sizes.
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
    """The number of the slice that a device is in."""
    return getattr(device, "slice_index", None) or 0

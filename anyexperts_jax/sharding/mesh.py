"""The device mesh: five named axes, of which most are 1 most of the time."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from anyexperts_jax.core.errors import comma_list, require

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. At most one is -1: all devices the others leave.

    Raises:
      UserError: for a size that is neither -1 nor >= 1, and for more than one -1.
    """

    data: int = -1  # copies of the parameters, each with its share of the batch
    fsdp: int = 1  # parameters and the batch both split
    expert: int = 1  # experts and the batch both split
    tensor: int = 1  # heads and FFN widths split
    sequence: int = 1  # positions of a sequence split

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            require(size >= 1 or size == -1, f"mesh.{name}={size} must be >= 1, or -1 for the devices left over")
        free = [name for name, size in dataclasses.asdict(self).items() if size == -1]
        require(len(free) <= 1, f"mesh axes {comma_list(free)} are all -1; at most one can take the devices left over")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The size of every axis on `num_devices` devices, in the order of MESH_AXES.

        Raises:
          UserError: when the sizes do not multiply to `num_devices`.
        """
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "all axes 1"
        fixed = math.prod(size for size in sizes.values() if size != -1)
        for name, size in sizes.items():
            if size == -1:
                require(num_devices % fixed == 0, f"mesh {asked}: {fixed} does not divide {num_devices} devices")
                sizes[name] = num_devices // fixed
        total = math.prod(sizes.values())
        require(total == num_devices, f"mesh {asked} needs {total} devices, there are {num_devices}")
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, by default all of them. Every mesh has all five axes, so rules need not ask."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=tuple(devices)
    )

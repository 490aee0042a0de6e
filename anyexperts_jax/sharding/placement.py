"""`Placement`: the mesh a computation runs on, and the rules that split arrays over its axes."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from anyexperts_jax.core.errors import require
from anyexperts_jax.sharding.mesh import MESH_AXES, MeshConfig, make_mesh
from anyexperts_jax.sharding.rules import ShardingRules
from anyexperts_jax.sharding.specs import DEFAULT_RULES, require_automatic


@dataclasses.dataclass(frozen=True)
class Placement:
    """The mesh and the sharding rules, passed down explicitly: there is no global mesh.

    Raises:
      UserError: for a mesh with explicit axes.
    """

    mesh: Mesh
    rules: ShardingRules = DEFAULT_RULES

    def __post_init__(self) -> None:
        require_automatic(self.mesh)

    @property
    def device(self) -> jax.Device:
        """One device of the mesh; all of them are of the same kind."""
        return self.mesh.devices.flat[0]


def placement_of(arrays: Any) -> Placement:
    """The placement of a tree of arrays: the mesh of their shardings, or the one device that holds them all.

    Raises:
      UserError: if the arrays lie on several devices without a mesh of `make_mesh`, or on different meshes.
    """
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array)]
    shardings = [leaf.sharding for leaf in leaves if not isinstance(leaf, jax.core.Tracer)]
    named = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
    meshes = {mesh for mesh in named if isinstance(mesh, Mesh) and mesh.axis_names == MESH_AXES}
    require(len(meshes) <= 1, "the parameters lie on different meshes; put all on one")
    if meshes:
        return Placement(meshes.pop())
    devices = {device for sharding in shardings for device in sharding.device_set}
    require(len(devices) <= 1, f"the parameters lie on {len(devices)} devices, but on no mesh of make_mesh")
    return one_device(devices.pop() if devices else None)


def one_device(device: jax.Device | None = None) -> Placement:
    """The placement on a mesh of one device, by default JAX's first."""
    return Placement(make_mesh(MeshConfig(data=1), [jax.devices()[0] if device is None else device]))


def is_split(placement: Placement | None) -> bool:
    """Whether arrays are spread over several devices. Without a placement they are on one."""
    return placement is not None and placement.mesh.size > 1

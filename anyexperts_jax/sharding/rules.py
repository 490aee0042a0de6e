"""The rules from logical axes to mesh axes. They are strict: every logical axis must have a rule."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.sharding.mesh import MESH_AXES

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that each logical axis is split over; None: not split. One field for every name in core.axes.

    Every logical axis has a rule, so an axis without one is an error and is never replicated silently. The batch is
    also split over `expert`: otherwise the devices of an expert group would all repeat the work outside the experts.

    Raises:
      UserError: for a mesh axis that does not exist.
    """

    batch: MeshAxes = ("data", "fsdp", "expert")
    length: MeshAxes = "sequence"

    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    latent: MeshAxes = None
    from_latent: MeshAxes = "fsdp"
    mlp: MeshAxes = "tensor"
    expert: MeshAxes = "expert"
    expert_mlp: MeshAxes = "tensor"
    router: MeshAxes = None
    modality: MeshAxes = None
    router_hidden: MeshAxes = None
    router_rank: MeshAxes = None
    importance: MeshAxes = None
    norm: MeshAxes = None
    lora: MeshAxes = None
    features: MeshAxes = None
    table: MeshAxes = None
    layers: MeshAxes = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            for axis in as_tuple(getattr(self, field.name)):
                require_one_of(f"mesh axis of rule {field.name!r}", axis, MESH_AXES)

    def spec(self, logical_axes: Sequence[str]) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions have these logical names.

        Raises:
          UserError: for an unknown logical axis, and for two dimensions that are split over the same mesh axis.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for axis in logical_axes:
            require_one_of("logical axis", axis, names)
        per_dimension = [getattr(self, axis) for axis in logical_axes]
        used = [mesh_axis for axes in per_dimension for mesh_axis in as_tuple(axes)]
        for mesh_axis in used:
            twice = f"mesh axis {mesh_axis!r} is used twice by an array of logical axes {tuple(logical_axes)}"
            require(used.count(mesh_axis) == 1, twice)
        return PartitionSpec(*per_dimension)


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes

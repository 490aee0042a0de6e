"""Trees of shardings: for parameters from their logical axes, for a batch from its fields' names."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.sharding.rules import ShardingRules

DEFAULT_RULES = ShardingRules()


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> dict[str, NamedSharding]:
    """The sharding of every array of a `Batch` by its field: sequences split, and positions where there are any."""
    fields = [field.name for field in dataclasses.fields(Batch)]
    axes = {name: ("batch", "length") if name.endswith("_BT") else ("batch",) for name in fields}
    return {name: NamedSharding(mesh, rules.spec(logical)) for name, logical in axes.items()}


def batch_shards(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> int:
    """The number of parts the sequences of a batch are split into; it must divide the batch size."""
    return parts(mesh, rules.spec(("batch",))[0])


def shard_batch(mesh: Mesh, batch: Batch, rules: ShardingRules = DEFAULT_RULES) -> Batch:
    """Puts a batch of this host onto the mesh."""
    shardings = batch_shardings(mesh, rules)
    return Batch(**{name: jax.device_put(getattr(batch, name), sharding) for name, sharding in shardings.items()})


def param_shardings(mesh: Mesh, logical_axes: Any, abstract_params: Any, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """The NamedSharding of every parameter.

    Args:
      logical_axes: the parameters' tree with a tuple of logical axis names at each leaf.
      abstract_params: the same tree of arrays or ShapeDtypeStructs.

    Raises:
      UserError: naming the parameter whose axes are unknown, too few, or not divisible by the mesh.
    """

    def sharding(path: Any, array: Any, axes: tuple[str, ...]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        require(len(axes) == len(array.shape), f"parameter {name}: logical axes {axes} for shape {array.shape}")
        spec = rules.spec(axes)
        for size, axis, mesh_axes in zip(array.shape, axes, spec, strict=True):
            count = parts(mesh, mesh_axes)
            indivisible = f"parameter {name}: {axis}={size} does not split over {mesh_axes} of {count} devices"
            require(size % count == 0, indivisible)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, abstract_params, logical_axes)


def parts(mesh: Mesh, mesh_axes: Any) -> int:
    """Into how many parts a dimension on `mesh_axes` is split."""
    names = () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    return math.prod(mesh.shape[name] for name in names)

"""Boxes for parameters that carry their initialiser and the logical names of their axes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from flax import serialization
from flax.core import meta
from jax.sharding import PartitionSpec

from anyexperts_jax.core.axes import LOGICAL_AXES
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.initializers import Initializer
from anyexperts_jax.core.tree import register_dataclass

AxisNames = tuple[str, ...]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedAxes(meta.AxisMetadata[Any]):
    """A parameter boxed with its axis names and initialiser.

    If `names` starts with "layers", `init` is the initialiser of one layer. Unboxing never adds a sharding constraint,
    unlike with `flax.linen.Partitioned`.
    """

    value: Any
    names: AxisNames = dataclasses.field(metadata={"static": True})
    init: Initializer = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "NamedAxes":
        return NamedAxes(val, self.names, self.init)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "NamedAxes":
        """Called by `nn.scan` and `nn.vmap`: the new axis is "layers" unless their `metadata_params` name another."""
        names = (*self.names[:index], params.get(nn.PARTITION_NAME, "layers"), *self.names[index:])
        return NamedAxes(self.value, names, self.init)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "NamedAxes":
        del params
        return NamedAxes(self.value, (*self.names[:index], *self.names[index + 1 :]), self.init)

    def get_partition_spec(self) -> PartitionSpec:
        """The logical axes, for `nn.get_partition_spec`. `nn.logical_to_mesh` maps them to mesh axes, by rules such as
        `dataclasses.asdict(ShardingRules()).items()`."""
        return PartitionSpec(*self.names)

    def to_nnx_metadata(self) -> dict[str, Any]:
        """The metadata that `flax.nnx.bridge.ToNNX` stores on the variable."""
        return vars(self).copy()

    @classmethod
    def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "NamedAxes":
        """Rebuilds the box from the variable's metadata; other entries belong to NNX."""
        return cls(metadata["value"], metadata["names"], metadata["init"])


def _to_state(box: NamedAxes) -> dict[str, Any]:
    return {"value": serialization.to_state_dict(box.value)}


def _from_state(box: NamedAxes, state: Any) -> NamedAxes:
    """Restores the value from the state made by `_to_state` or from an unboxed array; the rest is kept from `box`."""
    value = state["value"] if isinstance(state, dict) else state
    return box.replace_boxed(serialization.from_state_dict(box.value, value))


serialization.register_serialization_state(NamedAxes, _to_state, _from_state, override=True)


def named(init: Initializer, names: Sequence[str]) -> Callable[..., Any]:
    """Wraps the initialiser `init` so that the parameters it makes carry logical axis names.

    Raises:
      UserError: for a name that is not in `core.axes.LOGICAL_AXES`, or a number of names that differs from the axes'.
    """
    for name in names:
        require_one_of("axis name", name, LOGICAL_AXES)

    def boxed_init(key: Any, shape: tuple[int, ...], dtype: Any) -> NamedAxes:
        require(len(shape) == len(names), f"axis names {tuple(names)} do not fit a parameter of shape {shape}")
        return NamedAxes(init(key, shape, dtype), tuple(names), init)

    return boxed_init

"""Parameters that carry their initialiser and the logical names of their axes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from flax.core import meta

from anyexperts_jax.core.axes import LOGICAL_AXES
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.initializers import Initializer
from anyexperts_jax.core.tree import register_dataclass

AxisNames = tuple[str, ...]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedAxes(meta.AxisMetadata[Any]):
    """A parameter in a box with its axis names and initialiser.

    `init` is that of one layer where `names` begins with "layers". Unboxing never adds a sharding constraint,
    unlike `flax.linen.Partitioned`.
    """

    value: Any
    names: AxisNames = dataclasses.field(metadata={"static": True})
    init: Initializer = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "NamedAxes":
        return NamedAxes(val, self.names, self.init)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "NamedAxes":
        names = (*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:])
        return NamedAxes(self.value, names, self.init)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "NamedAxes":
        del params
        return NamedAxes(self.value, (*self.names[:index], *self.names[index + 1 :]), self.init)

    def to_nnx_metadata(self) -> dict[str, Any]:
        """What `flax.nnx.bridge.ToNNX` keeps on the variable."""
        return vars(self).copy()

    @classmethod
    def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "NamedAxes":
        """The box back from the variable's metadata, whose other entries are NNX's own."""
        return cls(metadata["value"], metadata["names"], metadata["init"])


def named(init: Initializer, names: Sequence[str]) -> Callable[..., Any]:
    """The initialiser `init` with logical axis names on what it makes.

    Raises:
      UserError: for a name outside `core.axes.LOGICAL_AXES`, or another number of names than axes.
    """
    for name in names:
        require_one_of("axis name", name, LOGICAL_AXES)

    def boxed_init(key: Any, shape: tuple[int, ...], dtype: Any) -> NamedAxes:
        require(len(shape) == len(names), f"axis names {tuple(names)} do not fit a parameter of shape {shape}")
        return NamedAxes(init(key, shape, dtype), tuple(names), init)

    return boxed_init

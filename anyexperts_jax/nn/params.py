"""Parameters that carry the logical names of their axes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from anyexperts_jax.core.axes import LOGICAL_AXES
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.tree import register_dataclass

AxisNames = tuple[str, ...]
Initializer = Callable[..., jax.Array]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedAxes(meta.AxisMetadata[Any]):
    """A parameter in a box with its axis names. Unboxing never adds a sharding constraint, unlike `nn.Partitioned`."""

    value: Any
    names: AxisNames = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "NamedAxes":
        return NamedAxes(val, self.names)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "NamedAxes":
        return NamedAxes(self.value, (*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "NamedAxes":
        del params
        return NamedAxes(self.value, (*self.names[:index], *self.names[index + 1 :]))


def named(init: Initializer, names: Sequence[str]) -> Callable[..., NamedAxes]:
    """The initialiser `init` with logical axis names on what it makes.

    Raises:
      UserError: for a name outside `core.axes.LOGICAL_AXES`, or another number of names than axes.
    """
    for name in names:
        require_one_of("axis name", name, LOGICAL_AXES)

    def boxed_init(key: jax.Array, shape: tuple[int, ...], *args: Any) -> NamedAxes:
        require(len(shape) == len(names), f"axis names {tuple(names)} do not fit a parameter of shape {shape}")
        return NamedAxes(init(key, shape, *args), tuple(names))

    return boxed_init


def fan_in_init(num_in: int = 1, num_batch: int = 0, scale: float = 1.0) -> Initializer:
    """Normal with standard deviation scale / sqrt(fan-in). Axes: batch (one matrix each), then input, then output."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        fan_in = 1
        for size in shape[num_batch : num_batch + num_in]:
            fan_in *= size
        return (scale * fan_in**-0.5 * jax.random.normal(key, shape)).astype(dtype)

    return init

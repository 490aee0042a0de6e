"""Initializers, and `Param`, the declaration of a parameter."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Constant:
    """Fills the array with one value."""

    value: float

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        del key
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal distribution with mean zero."""

    scale: float

    def std(self, shape: tuple[int, ...]) -> float:
        del shape
        return self.scale

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return (self.std(shape) * jax.random.normal(key, shape)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class FanIn(Normal):
    """Normal with standard deviation scale / sqrt(fan-in). Axes: batch (one matrix each), then input, then output."""

    scale: float = 1.0
    num_in: int = 1
    num_batch: int = 0

    def std(self, shape: tuple[int, ...]) -> float:
        return self.scale * math.prod(shape[self.num_batch : self.num_batch + self.num_in]) ** -0.5


Initializer = Constant | Normal  # (key, shape, dtype) -> values


@dataclasses.dataclass(frozen=True)
class Param:
    """The declaration of one parameter: its shape, the logical names of its axes (`core.axes`) and its initializer."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer

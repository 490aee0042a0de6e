"""The expert kernels at the studied shapes, forward and backward in one program."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from anyexperts_jax.core.shapes import KERNEL_SHAPES, LayerShape
from anyexperts_jax.core.shapes import SHAPES as LAYERS
from anyexperts_jax.ops.expert_mlp import expert_mlp


class ExpertShape(NamedTuple):
    """Experts, width, expert width, and the rows of all experts together."""

    experts: int
    width: int
    hidden: int
    rows: int

    @property
    def capacity(self) -> int:
        """Rows of an expert's buffer: a quarter more than its share."""
        return math.ceil(1.25 * self.rows / self.experts)


def _experts_of(layer: LayerShape) -> ExpertShape:
    return ExpertShape(layer.experts, layer.width, layer.hidden, layer.rows)


SHAPES = {name: _experts_of(LAYERS[name]) for name in KERNEL_SHAPES}


def arguments(shape: ExpertShape, dtype: Any = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    """(x, counts, w_gate, w_up, w_down, gradient of y), abstract."""
    E, D, F, _ = shape
    rows, up, down = (E, shape.capacity, D), (E, D, F), (E, F, D)
    floats = [jax.ShapeDtypeStruct(s, dtype) for s in (rows, up, up, down, rows)]
    return [floats[0], jax.ShapeDtypeStruct((E,), jnp.int32), *floats[1:]]


def forward_backward(
    x_ECD: Array, counts_E: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array, d_y_ECD: Array
) -> tuple[Array, ...]:
    """y and the four gradients, by the default implementation of the platform in use."""
    y_ECD, pull = jax.vjp(
        lambda x_ECD, *weights: expert_mlp(x_ECD, counts_E, *weights), x_ECD, w_gate_EDF, w_up_EDF, w_down_EFD
    )
    return y_ECD, *pull(d_y_ECD)

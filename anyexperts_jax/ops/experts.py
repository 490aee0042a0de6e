"""`ExpertWeights`, the experts' weights as one pytree, and `ExpertOps`, the two ops of an implementation."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.arrays import as_floats
from anyexperts_jax.core.errors import require, shown
from anyexperts_jax.core.tree import register_dataclass


class ExpertWeights(NamedTuple):
    """The SwiGLU weights of E experts: expert e computes (silu(x gate[e]) * (x up[e])) down[e]."""

    gate_EDF: Float[Array, "E D F"]
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedExperts:
    """The experts of one layer, read from the weights of all layers without taking the layer out.

    Taking a layer out copies all of its experts, including those that no token hits. That copy would be nearly all of
    the time of a step of decoding.
    """

    weights: ExpertWeights  # of the experts of all L layers, as they are stored: gate is [L * E, D, F]
    first: Int[Array, ""]  # the index of the layer's first expert


def as_expert_weights(weights: Any) -> ExpertWeights:
    """Converts (gate, up, down) to JAX arrays.

    Raises:
      UserError: if there are not three, or one is not an array of a dtype that experts compute in.
    """
    names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
    three = isinstance(weights, (tuple, list)) and len(weights) == len(names)
    require(three, f"the experts' weights are {shown(weights)}; they must be ExpertWeights(gate_EDF, up_EDF, down_EFD)")
    return ExpertWeights(*map(as_floats, names, weights))


@dataclasses.dataclass(frozen=True)
class InPlace:
    """An implementation's `routed_mlp` on `StackedExperts`. It has no gradient: only decoding calls it."""

    # (x_ND, weights_NK, order, StackedExperts) -> y_ND in float32 or wider: what `routed_mlp` gives for the layer's own
    run: Callable[..., Array]
    multiple: int = 1  # of which D and F must be: others would be padded, which copies all weights
    casts: bool = False  # whether the weights may have another dtype than x
    most_slots: float = math.inf  # per expert of a layer, up to which `run` is the faster way

    def pays(self, slots: int, num_experts: int, weights: ExpertWeights, dtype: jnp.dtype) -> bool:
        """Whether `run` copies none of the weights and is the faster way for so many slots of x in `dtype`."""
        gate = weights.gate_EDF
        fits = all(size % self.multiple == 0 for size in gate.shape[1:]) and (self.casts or gate.dtype == dtype)
        return fits and slots / num_experts <= self.most_slots


@dataclasses.dataclass(frozen=True)
class ExpertOps:
    """One implementation of the expert ops, an entry of `core.registries.IMPLEMENTATIONS`.

    Both functions are differentiable in x, the combine weights and the experts' weights; `residuals` is "saved" or
    "recomputed". `ops.expert_mlp.expert_mlp` and `ops.routed_mlp.routed_mlp` define the results.
    """

    # (x_ECD, counts_E, gate_EDF, up_EDF, down_EFD, residuals=...) -> y_ECD
    expert_mlp: Callable[..., Array]
    # (x_ND, weights_NK, order, ExpertWeights, residuals=...) -> y_ND in float32 or wider
    routed_mlp: Callable[..., Array]
    # None: a layer's experts are copied out of the stack of all layers before they are read
    in_place: InPlace | None = None

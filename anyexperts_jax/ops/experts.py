"""What every way of computing experts shares: their weights as one pytree, and the two ops an implementation has."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float


class ExpertWeights(NamedTuple):
    """The SwiGLU weights of E experts: expert e computes (silu(x gate[e]) * (x up[e])) down[e]."""

    gate_EDF: Float[Array, "E D F"]
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]


@dataclasses.dataclass(frozen=True)
class ExpertOps:
    """One implementation of the expert compute, an entry of `core.registries.IMPLEMENTATIONS`.

    Both functions are differentiable in x, the slots' weights and the experts' weights; `residuals` is "saved" or
    "recomputed". `ops.expert_mlp.expert_mlp` and `ops.routed_mlp.routed_mlp` define the results.
    """

    # (x_ECD, counts_E, gate_EDF, up_EDF, down_EFD, residuals=...) -> y_ECD
    expert_mlp: Callable[..., Array]
    # (x_ND, weights_NK, order, ExpertWeights, residuals=...) -> y_ND in float32 at least
    routed_mlp: Callable[..., Array]

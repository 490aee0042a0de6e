"""The XLA implementation with its custom backward pass."""

from jaxtyping import Array, Float

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp import loop, reference, xla
from anyexperts_jax.ops.slot_order import SlotOrder


@Differentiable
def routed_mlp_xla(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: ExpertWeights,
) -> Float[Array, "N D"]:
    return xla.forward(x_ND, weights_NK, order, experts, keep=False)[0]


def _forward(x_ND: Array, weights_NK: Array, order: SlotOrder, experts: ExpertWeights) -> tuple[Array, tuple]:
    y_ND, kept = xla.forward(x_ND, weights_NK, order, experts, keep=True)
    return y_ND, (x_ND, weights_NK, order, experts, kept)


def _backward(residuals: tuple, d_y_ND: Array) -> tuple[Array, Array, None, ExpertWeights]:
    x_ND, weights_NK, order, experts, kept = residuals
    d_x_ND, d_weights_NK, d_experts = loop.backward(x_ND, weights_NK, order, experts, kept, d_y_ND)
    return d_x_ND, d_weights_NK, None, ExpertWeights(*d_experts)


routed_mlp_xla.defvjp(_forward, _backward, definition=reference.routed_mlp)

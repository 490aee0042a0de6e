"""The XLA implementation with its custom backward pass."""

from jaxtyping import Array, Float, Int

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.ops.expert_mlp import reference, xla


@Differentiable
def expert_mlp_xla(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
) -> Float[Array, "E C D"]:
    return xla.forward(x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)[0]


def _backward(residuals: xla.Residuals, d_y_ECD: Float[Array, "E C D"]) -> tuple[Array | None, ...]:
    d_x_ECD, *d_weights = xla.backward(residuals, d_y_ECD)
    return d_x_ECD, None, *d_weights


expert_mlp_xla.defvjp(xla.forward, _backward, definition=reference.expert_mlp)

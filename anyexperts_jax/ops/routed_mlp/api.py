"""`routed_mlp`: each token through its selected experts, dropless."""

from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.core.registries import IMPLEMENTATIONS
from anyexperts_jax.ops._checks import check_counts, check_expert_weights, check_residuals
from anyexperts_jax.ops._select import default_implementation
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.slot_order import SlotOrder


def routed_mlp(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: ExpertWeights,
    *,
    implementation: str | None = None,
    residuals: str = "saved",
) -> Float[Array, "N D"]:
    """Sums weight * (silu(x w_gate) * (x w_up)) w_down over each token's real slots. Time is proportional to these.

    The op takes tokens instead of gathered rows, so that an implementation need not write the rows to memory. Sums are
    accumulated in float32, and the result is float32 (float64 for float64) whatever x's dtype.

    Args:
      order: the slots of `weights_NK`, sorted by expert. It may leave out empty slots: see `SlotOrder`.
      implementation: "pallas_tpu", "pallas_gpu" (Hopper, bfloat16), "pallas_triton" (NVIDIA GPUs; bfloat16, and
        float32 multiplied as TF32), "xla" or "reference". None chooses "pallas_tpu" on a TPU and "pallas_triton" on an
        NVIDIA GPU if x is bfloat16 or float32 and the trace sees one device (one in use, or in a `shard_map`), and
        "xla" otherwise. The platform is that of the mesh in use, else of JAX's default backend.
      residuals: "saved" keeps gate and up for the backward pass, 2 * F elements of x's dtype per row; "recomputed"
        keeps only the operands and runs the forward pass again.

    Raises:
      UserError: for shapes or dtypes that do not fit, an unknown implementation, or one that cannot run here.
    """
    check_expert_weights(x_ND, *experts)
    check_counts("order.counts_E", order.counts_E, experts.gate_EDF.shape[0])
    require(
        order.places_NK.shape == weights_NK.shape and order.slots_R.size <= weights_NK.size,
        f"weights_NK has shape {weights_NK.shape}, the order is of {order.places_NK.shape} slots",
    )
    check_residuals(residuals)
    ops = IMPLEMENTATIONS[default_implementation(x_ND.dtype) if implementation is None else implementation]
    return ops.routed_mlp(x_ND, weights_NK, order, experts, residuals=residuals)

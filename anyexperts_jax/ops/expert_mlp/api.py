"""`expert_mlp`: each expert's SwiGLU MLP over its own buffer of rows."""

from jaxtyping import Array, Float, Int

from anyexperts_jax.core.arrays import as_array, as_floats, vary_alike
from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.registries import IMPLEMENTATIONS
from anyexperts_jax.ops._checks import check_counts, check_expert_weights, check_residuals
from anyexperts_jax.ops._select import default_implementation
from anyexperts_jax.ops.experts import as_expert_weights


def expert_mlp(
    x_ECD: Float[ArrayLike, "E C D"],
    counts_E: Int[ArrayLike, "E"],
    w_gate_EDF: Float[ArrayLike, "E D F"],
    w_up_EDF: Float[ArrayLike, "E D F"],
    w_down_EFD: Float[ArrayLike, "E F D"],
    implementation: str | None = None,
    *,
    residuals: str = "saved",
) -> Float[Array, "E C D"]:
    """(silu(x w_gate) * (x w_up)) w_down for the first `counts_E[e]` rows of expert e.

    Rows at or beyond an expert's count give zeros and get zero gradients, whatever they hold. Sums are accumulated in
    float32; the result has x's dtype. Arrays may be JAX's or NumPy's.

    Args:
      implementation: "pallas_tpu", "pallas_gpu" (Hopper, bfloat16), "pallas_triton" (NVIDIA GPUs; bfloat16, and
        float32 multiplied as TF32), "xla" or "reference". None chooses "pallas_tpu" on a TPU and "pallas_triton" on an
        NVIDIA GPU if x is bfloat16 or float32 and the trace sees one device (one in use, or in a `shard_map`), and
        "xla" otherwise. The platform is that of the mesh in use, else of JAX's default backend.
      residuals: "saved" keeps gate and up for the backward pass, 2 * E * C * F elements of x's dtype; "recomputed"
        keeps only the operands.

    Raises:
      UserError: for shapes or dtypes that do not fit, an unknown implementation, or one that cannot run here.

    Example:
        >>> import anyexperts_jax as ax, numpy as np
        >>> x_ECD, gate_EDF, up_EDF, down_EFD = np.ones((4, 2, 8, 8), "float32")
        >>> y_ECD = ax.expert_mlp(x_ECD, np.array([8, 3]), gate_EDF, up_EDF, down_EFD)
        >>> (y_ECD != 0).any(axis=2).sum(axis=1).tolist()  # rows in use of two experts
        [8, 3]
    """
    x_ECD, counts_E = as_floats("x_ECD", x_ECD), as_array("counts_E", counts_E)
    experts = as_expert_weights((w_gate_EDF, w_up_EDF, w_down_EFD))
    require(x_ECD.ndim == 3, f"x_ECD has shape {x_ECD.shape}; it must be [E, C, D]")
    check_expert_weights(x_ECD, *experts)
    require(
        x_ECD.shape[0] == experts.gate_EDF.shape[0],
        f"x_ECD holds {x_ECD.shape[0]} experts, the weights {experts.gate_EDF.shape[0]}",
    )
    check_counts("counts_E", counts_E, x_ECD.shape[0])
    check_residuals(residuals)
    ops = IMPLEMENTATIONS[default_implementation(x_ECD.dtype) if implementation is None else implementation]
    operands = vary_alike([x_ECD, counts_E, *experts])
    return ops.expert_mlp(*operands, residuals=residuals)

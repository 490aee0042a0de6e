"""`expert_mlp`: every expert's SwiGLU MLP over its own buffer of rows."""

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._checks import check_counts, check_expert_weights
from anyexperts_jax.ops._select import select_implementation
from anyexperts_jax.ops.expert_mlp import reference, vjp

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"reference": reference.expert_mlp, "xla": vjp.expert_mlp_xla}
DEFAULT_IMPLEMENTATION = "xla"  # on every platform


def expert_mlp(
    x_ECD: Float[Array, "E C D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    implementation: str | None = None,
) -> Float[Array, "E C D"]:
    """(silu(x w_gate) * (x w_up)) w_down for the first `counts_E[e]` rows of expert e.

    Rows at or past an expert's count come out zero and get zero gradient, whatever they hold. Sums are accumulated
    in float32; the result has x's dtype.

    Args:
      implementation: "xla" or "reference"; None is "xla".

    Raises:
      UserError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    require(x_ECD.ndim == 3, f"x_ECD has shape {x_ECD.shape}; it must be [E, C, D]")
    check_expert_weights(x_ECD, w_gate_EDF, w_up_EDF, w_down_EFD)
    require(
        x_ECD.shape[0] == w_gate_EDF.shape[0],
        f"x_ECD holds {x_ECD.shape[0]} experts, the weights {w_gate_EDF.shape[0]}",
    )
    check_counts("counts_E", counts_E, x_ECD.shape[0])
    run = select_implementation(implementation, IMPLEMENTATIONS, DEFAULT_IMPLEMENTATION)
    return run(x_ECD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)

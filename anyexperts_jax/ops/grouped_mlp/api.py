"""`grouped_mlp`: the experts' SwiGLU MLPs over rows that lie expert after expert."""

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._checks import check_counts, check_expert_weights
from anyexperts_jax.ops._select import select_implementation
from anyexperts_jax.ops.grouped_mlp import reference, vjp

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"reference": reference.grouped_mlp, "xla": vjp.grouped_mlp_xla}
DEFAULT_IMPLEMENTATION = "xla"  # on every platform


def grouped_mlp(
    x_RD: Float[Array, "R D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """(silu(x w_gate) * (x w_up)) w_down, each row through its own expert; the time follows the sum of the counts.

    The first `counts_E[0]` rows are expert 0's, the next `counts_E[1]` expert 1's, and so on. Rows past the last
    expert's come out zero and get zero gradient, whatever they hold. Sums are accumulated in float32; the result
    has x's dtype.

    Args:
      counts_E: non-negative, at most R in sum.
      implementation: "xla" or "reference"; None is "xla".

    Raises:
      UserError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    require(x_RD.ndim == 2, f"x_RD has shape {x_RD.shape}; it must be [R, D]")
    check_expert_weights(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD)
    check_counts("counts_E", counts_E, w_gate_EDF.shape[0])
    run = select_implementation(implementation, IMPLEMENTATIONS, DEFAULT_IMPLEMENTATION)
    return run(x_RD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)

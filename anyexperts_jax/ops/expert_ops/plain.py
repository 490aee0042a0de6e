"""The implementations without kernels: the reference, which is the definition, and the form that XLA runs fast."""

from collections.abc import Callable

import jax
from jaxtyping import Array

from anyexperts_jax.ops.expert_mlp import reference as expert_reference
from anyexperts_jax.ops.expert_mlp import vjp as expert_vjp
from anyexperts_jax.ops.experts import ExpertOps, InPlace
from anyexperts_jax.ops.routed_mlp import reference as routed_reference
from anyexperts_jax.ops.routed_mlp import vjp as routed_vjp
from anyexperts_jax.ops.routed_mlp import xla as routed_xla


def with_residuals(run: Callable[..., Array]) -> Callable[..., Array]:
    """Adds the option `residuals` to `run`: "recomputed" runs it again as a whole in the backward pass."""

    def op(*operands: object, residuals: str) -> Array:
        return run(*operands) if residuals == "saved" else jax.checkpoint(run)(*operands)

    return op


REFERENCE = ExpertOps(with_residuals(expert_reference.expert_mlp), with_residuals(routed_reference.routed_mlp))
XLA = ExpertOps(
    with_residuals(expert_vjp.expert_mlp_xla),
    with_residuals(routed_vjp.routed_mlp_xla),
    InPlace(routed_xla.forward_of_few_rows, casts=True, most_slots=routed_xla.FEW_ROWS),
)

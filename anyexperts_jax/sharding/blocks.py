"""`dispatch="blocks"` among devices: each runs all experts on its own tokens and on no others."""

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.dispatch.base import DispatchStats
from anyexperts_jax.dispatch.blocks import apply_blocks, apply_slots
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.sharding.expert_parallel import Placement, on_own_tokens
from anyexperts_jax.sharding.specs import parts, require_divided


def split_blocks(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    placement: Placement | None,
    num_sequences: int,
    implementation: str | None,
    residuals: str,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """`dispatch.blocks.apply_blocks` with its work split as the tokens are; stats of all devices in sum.

    Left to itself, XLA sorts the slots of all tokens on every device, and each computes every row. Here every device
    has the weights of all experts gathered, in x's dtype, for as long as the layer takes, and the gradients of weights
    are summed over the devices; no row travels. FFN widths split over devices give partial sums, added once per token.

    Raises:
      UserError: sequences, positions or widths that the mesh does not divide.
    """
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    if placement is None or placement.mesh.size == 1:
        return apply_blocks(x_ND, plan, *weights, implementation=implementation, residuals=residuals)
    mesh, rules = placement.mesh, placement.rules
    tokens_spec, width_axes = PartitionSpec(*rules.spec(("batch", "length"))), rules.expert_mlp
    require_divided(mesh, tokens_spec, num_sequences, x_ND.shape[0] // num_sequences)
    width, split = w_gate_EDF.shape[2], parts(mesh, width_axes)
    require(width % split == 0, f"experts {width} wide do not split over mesh axes {width_axes} of {split} devices")
    token_axes = jax.tree.leaves(tuple(tokens_spec))

    def run(x_BTD: Array, ids_BTK: Array, weights_BTK: Array, *experts: Array) -> tuple[Array, DispatchStats]:
        own = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, ids_BTK, weights_BTK))
        y_ND, stats = apply_slots(*own, *experts, implementation=implementation, residuals=residuals)
        if split > 1:
            y_ND = lax.psum(y_ND, width_axes)
        return y_ND.reshape(x_BTD.shape), jax.tree.map(lambda count: lax.psum(count, token_axes), stats)

    return on_own_tokens(run, x_ND, plan, weights, placement, num_sequences, None)

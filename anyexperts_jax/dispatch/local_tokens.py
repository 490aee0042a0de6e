"""The `shard_map` of the dispatchers in which each device of a mesh computes its own tokens."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from anyexperts_jax.dispatch.base import DispatchStats
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import require_divided


def token_axes(placement: Placement) -> tuple[str, ...]:
    """The mesh axes that split tokens: those of batch and length."""
    return tuple(jax.tree.leaves(tuple(placement.rules.spec(("batch", "length")))))


def map_local_tokens(
    run: Callable[..., tuple[Array, DispatchStats]],
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    experts: ExpertWeights,
    placement: Placement,
    *,
    expert_axis: str | None = None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """Maps `run` over the devices, each with its own part of x_BTD, ids_BTK, weights_BTK and the experts.

    Args:
      run: returns (y_BTD, stats). It must sum y over the mesh axes that split the FFN width, and the stats over all
        tokens.
      expert_axis: the mesh axis that splits the experts; None: every device gathers all of them.

    Raises:
      UserError: for sequences or positions that the mesh does not divide.
    """
    rules, sequences = placement.rules, plan.spec.num_sequences
    tokens_spec = PartitionSpec(*rules.spec(("batch", "length")))
    require_divided(placement.mesh, tokens_spec, sequences, x_ND.shape[0] // sequences)
    wide: Any = PartitionSpec(expert_axis, None, rules.expert_mlp)
    narrow: Any = PartitionSpec(expert_axis, rules.expert_mlp, None)
    tokens = (a.reshape(sequences, -1, a.shape[1]) for a in (x_ND, plan.expert_ids_NK, plan.weights_NK))
    sharded = jax.shard_map(
        run,
        mesh=placement.mesh,
        in_specs=(tokens_spec, tokens_spec, tokens_spec, ExpertWeights(wide, wide, narrow)),
        out_specs=(tokens_spec, PartitionSpec()),
        check_vma=False,  # Pallas calls do not declare over which mesh axes their results vary
    )
    y_BTD, stats = sharded(*tokens, experts)
    return y_BTD.reshape(x_ND.shape), stats

"""`moe_exchange_stats`: `dispatch="exchange"`, each device with its own tokens and experts under one `shard_map`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.dispatch.base import DispatchStats, add_virtual_output
from anyexperts_jax.dispatch.exchange import Experts, apply_exchange
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.sharding.rules import ShardingRules
from anyexperts_jax.sharding.specs import DEFAULT_RULES, parts, require_automatic, require_divided


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays live: what a layer must know that speaks to other devices itself.

    Raises:
      UserError: for a mesh with explicit axes.
    """

    mesh: Mesh
    rules: ShardingRules = DEFAULT_RULES

    def __post_init__(self) -> None:
        require_automatic(self.mesh)


def moe_exchange_stats(
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    placement: Placement,
    implementation: str | None = None,
    *,
    num_sequences: int,
    residuals: str = "saved",
    chunks: int = 1,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """What `dispatch.moe_apply_stats` gives, computed where the experts are; stats of all devices in sum.

    Tokens stay with the device that has them; a real slot's row goes to the device that holds its expert, through its
    kernels, and back. FFN widths split over devices give partial sums that are added once per token. Every device
    holds whole rows of x; weights split over `fsdp` are gathered first.

    Args:
      chunks: into which a device cuts the positions of its sequences. Each has buffers of its own, and one can travel
        while another is computed, where the compiler lets all-to-alls run beside other work.

    Raises:
      UserError: experts, widths, sequences or positions that the mesh or `chunks` does not divide.
    """
    mesh, rules = placement.mesh, placement.rules
    tokens_spec = PartitionSpec(*rules.spec(("batch", "length")))
    expert_axis, width_axis = rules.expert, rules.expert_mlp
    require(isinstance(expert_axis, str), f"dispatch='exchange' needs one mesh axis of experts and has {expert_axis!r}")
    positions = x_ND.shape[0] // num_sequences
    _check(mesh, tokens_spec, (num_sequences, positions), plan.spec.num_experts, str(expert_axis), chunks)

    token_axes = jax.tree.leaves(tuple(tokens_spec))

    def exchange(x_BTD: Array, ids_BTK: Array, weights_BTK: Array, experts: Experts) -> tuple[Array, DispatchStats]:
        x_ND, ids_NK, weights_NK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, ids_BTK, weights_BTK))
        y_ND, stats = apply_exchange(
            x_ND,
            ids_NK,
            weights_NK,
            plan.spec,
            experts,
            axis=str(expert_axis),
            num_sequences=x_BTD.shape[0],
            implementation=implementation,
            residuals=residuals,
        )
        return y_ND.reshape(x_BTD.shape), stats

    def run(x_BTD: Array, ids_BTK: Array, weights_BTK: Array, *experts: Array) -> tuple[Array, DispatchStats]:
        pieces = zip(*(jnp.split(a, chunks, axis=1) for a in (x_BTD, ids_BTK, weights_BTK)), strict=True)
        own = (experts[0], experts[1], experts[2])
        done = [exchange(x_BtD, ids_BtK, weights_BtK, own) for x_BtD, ids_BtK, weights_BtK in pieces]
        y_BTD = jnp.concatenate([y_BtD for y_BtD, _ in done], axis=1)
        if width_axis is not None:
            y_BTD = lax.psum(y_BTD, width_axis)
        return y_BTD, jax.tree.map(lambda *counts: lax.psum(sum(counts), token_axes), *(stats for _, stats in done))

    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    y_ND, stats = on_own_tokens(run, x_ND, plan, weights, placement, num_sequences, str(expert_axis))
    return add_virtual_output(y_ND, x_ND, plan), stats


def on_own_tokens(
    run: Callable[..., tuple[Array, DispatchStats]],
    x_ND: Float[Array, "N D"],
    plan: RoutingPlan,
    weights: Experts,
    placement: Placement,
    num_sequences: int,
    expert_axis: str | None,
) -> tuple[Float[Array, "N D"], DispatchStats]:
    """What `run` makes, on each device, of its own part of x_BTD, ids_BTK and weights_BTK and of the experts.

    Args:
      run: returns (y_BTD, stats), y summed over what splits the FFN's width and the stats over all tokens.
      expert_axis: the mesh axis that splits the experts; None: every device has all of them, gathered.
    """
    rules = placement.rules
    tokens_spec = PartitionSpec(*rules.spec(("batch", "length")))
    wide = PartitionSpec(expert_axis, None, rules.expert_mlp)
    narrow = PartitionSpec(expert_axis, rules.expert_mlp, None)
    tokens = (a.reshape(num_sequences, -1, a.shape[1]) for a in (x_ND, plan.expert_ids_NK, plan.weights_NK))
    sharded = jax.shard_map(
        run,
        mesh=placement.mesh,
        in_specs=(tokens_spec, tokens_spec, tokens_spec, wide, wide, narrow),
        out_specs=(tokens_spec, PartitionSpec()),
        check_vma=False,
    )
    y_BTD, stats = sharded(*tokens, *weights)
    return y_BTD.reshape(x_ND.shape), stats


def _check(
    mesh: Mesh, tokens_spec: PartitionSpec, tokens: tuple[int, int], num_experts: int, expert_axis: str, chunks: int
) -> None:
    shards = mesh.shape[expert_axis]
    require(num_experts % shards == 0, f"{num_experts} experts do not split over mesh axis {expert_axis!r} of {shards}")
    require_divided(mesh, tokens_spec, *tokens)
    own = tokens[1] // parts(mesh, tokens_spec[1])
    require(own % chunks == 0, f"stack.exchange_chunks={chunks} must divide the {own} positions that a device has")

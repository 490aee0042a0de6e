"""Salience: how much the loss feels a token's experts, and the importance loss that learns a token's rank by it.

An extension of ours, not part of AnyExperts. Why: gradients to first order do not tell an informative token from a
redundant one. Where the router and the experts have settled, scaling a token's experts up or down changes the loss by
nothing on average, so the gradient that reaches importance has no settled sign, and importance drifts. What is left is
of second order: the square of the first-order change, large where the answer hangs on the token and near zero where no
later computation looks at it.

A rank is a statistic of the tokens that it is taken among. `salience_scope` says which:

    batch     all tokens of the (micro-)batch, on all devices: the default. Slots move between sequences and modalities,
              and every mesh computes what one device does. But on a mesh every device gathers and sorts the saliences
              of all of them, in each MoE layer's backward pass.
    device    the tokens that a device holds: a sample of the batch, whose ranks cost no communication. They differ
              with the mesh and with the number of micro-batches.
    sequence  the tokens of a sequence. No communication either, and the same target on every mesh and in every
              micro-batch, but slots move within a sequence alone.

What each sends and sorts: experiments/results/salience_scope.md.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.switches import SalienceScope
from anyexperts_jax.routing.losses import masked_mean


def token_groups(scope: SalienceScope, num_sequences: int, batch_shards: int | None) -> int:
    """Into how many equal groups of consecutive tokens a scope cuts a batch.

    Args:
      batch_shards: into how many parts the devices cut the sequences. A batch that it does not divide, as one of a
        single sequence, they hold in fewer. None: the caller does not know.

    Raises:
      UserError: the scope "device" where nobody says how many devices there are.
    """
    if scope == "sequence":
        return num_sequences
    if scope == "batch":
        return 1
    if batch_shards is None:
        raise UserError(
            'salience_scope="device" needs batch_shards, into how many parts devices cut the sequences: 1 on one device'
        )
    return math.gcd(num_sequences, batch_shards)


@functools.partial(Differentiable, num_static=1)
def rank_by_salience(
    weights_NK: Float[Array, "N K"],
    importance_N: Float[Array, "N"],
    valid_N: Bool[Array, "N"],
    groups: int = 1,
) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """(weights_NK as they are, mean (w - q)^2), q the token's midrank in (0, 1) by salience among the valid tokens of
    its group: the tokens are cut into `groups` runs of equal length.

    Salience, sum_k (weight_k dL/dweight_k)^2, is known in the backward pass alone, where the gradient to w is exact,
    2 (w - q) / N. The value returned is that of a q of 1/2 for every token. The ranks' mean is 1/2 whatever they are:
    the loss moves slots from token to token within one budget. To dispatch, use the weights returned here.
    """
    return weights_NK, masked_mean((importance_N - 0.5) ** 2, valid_N)


def _forward(
    weights_NK: Array, importance_N: Array, valid_N: Array, groups: int
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    return rank_by_salience.run(weights_NK, importance_N, valid_N, groups), (weights_NK, importance_N, valid_N)


def _backward(groups: int, saved: tuple[Array, Array, Array], grads: tuple[Array, Array]) -> tuple[Array, Array, None]:
    weights_NK, importance_N, valid_N = saved
    weights_grad_NK, loss_grad = grads
    salience_N = jnp.square(weights_NK * weights_grad_NK).sum(axis=1)
    rank_N = midranks(salience_N.reshape(groups, -1), valid_N.reshape(groups, -1)).reshape(-1)
    tokens = jnp.maximum(valid_N.sum(dtype=jnp.float32), 1)
    return weights_grad_NK, jnp.where(valid_N, 2 * loss_grad * (importance_N - rank_N) / tokens, 0), None


rank_by_salience.defvjp(
    _forward,
    _backward,
    definition=rank_by_salience.run,
    refusal="importance_regulariser='salience' knows a token's rank in the backward pass alone: use jax.grad, or "
    "another regulariser for jvp and jacfwd",
    plain_backward=True,
)


def midranks(values_GM: Float[Array, "*G M"], valid_GM: Bool[Array, "*G M"]) -> Float[Array, "*G M"]:
    """The share of its group's valid values below each, equals counting half: in (0, 1), mean 1/2. Anything where not
    valid."""
    size = values_GM.shape[-1]
    places_GM = jnp.broadcast_to(jnp.arange(size), values_GM.shape)
    keys_GM = jnp.where(valid_GM, values_GM, jnp.inf)
    sorted_GM, from_GM = jax.lax.sort((keys_GM, places_GM), dimension=-1, num_keys=1, is_stable=False)
    # A run of equals begins where a value differs from the one before; all in it have the run's middle as their rank.
    changes_GM = sorted_GM[..., 1:] != sorted_GM[..., :-1]
    edge = jnp.ones((*sorted_GM.shape[:-1], 1), bool)
    opens_GM, closes_GM = jnp.concatenate([edge, changes_GM], -1), jnp.concatenate([changes_GM, edge], -1)
    axis = sorted_GM.ndim - 1
    first_GM = jax.lax.cummax(jnp.where(opens_GM, places_GM, 0), axis)
    past_GM = jax.lax.cummin(jnp.where(closes_GM, places_GM + 1, size), axis, reverse=True)
    _, twice_GM = jax.lax.sort((from_GM, first_GM + past_GM), dimension=-1, num_keys=1, is_stable=False)
    count_G1 = valid_GM.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    return twice_GM.astype(jnp.float32) / (2 * jnp.maximum(count_G1, 1))

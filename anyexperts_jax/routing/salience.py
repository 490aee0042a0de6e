"""Salience: the effect of a token's experts on the loss, and the importance loss that teaches a token's rank by it.

An extension of ours, not part of AnyExperts. Its reason: first-order gradients do not distinguish an informative token
from a redundant one. Once the router and the experts have converged, scaling a token's experts up or down does not
change the loss on average. So the gradient that reaches importance has no consistent sign, and importance drifts. What
remains is of second order: the square of the first-order change. It is large if the answer depends on the token, and
near zero if no later computation reads it.

A rank depends on the tokens it is taken among. `salience_scope` says which:

    batch     all tokens of the (micro-)batch on all devices; the default. Slots can move between sequences and
              modalities, and every mesh gives the result of a single device. But on a mesh, each MoE layer's backward
              pass makes every device gather and sort the saliences of all of them.
    device    the tokens on the same device, a sample of the batch. The ranks need no communication, but they change
              with the mesh and with the number of micro-batches.
    sequence  the tokens of the same sequence. No communication either, and the target is the same on every mesh and
              for any micro-batches, but slots move only within a sequence.

experiments/results/salience_scope.md has what each of them communicates and sorts.
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
    """The number of equal groups of consecutive tokens into which a scope divides a batch.

    Args:
      batch_shards: the number of parts into which the devices split the sequences; a batch that cannot be divided by
        it, such as a single sequence, is split into fewer. None: the caller does not know.

    Raises:
      UserError: for the scope "device" if `batch_shards` is None.
    """
    if scope == "sequence":
        return num_sequences
    if scope == "batch":
        return 1
    if batch_shards is None:
        raise UserError(
            'salience_scope="device" needs batch_shards, the number of parts into which devices split the sequences; '
            "pass 1 on one device"
        )
    return math.gcd(num_sequences, batch_shards)


@functools.partial(Differentiable, num_static=1)
def rank_by_salience(
    weights_NK: Float[Array, "N K"],
    importance_N: Float[Array, "N"],
    valid_N: Bool[Array, "N"],
    groups: int = 1,
) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """(weights_NK unchanged, mean (w - q)^2), where q in (0, 1) is the midrank of the token's salience among the valid
    tokens of its group. The tokens form `groups` runs of equal length.

    Salience, sum_k (weight_k dL/dweight_k)^2, is known in the backward pass only. There the gradient by w is exact,
    2 (w - q) / N; the returned value is computed as if every q were 1/2. The mean of the ranks is always 1/2, so the
    loss moves slots between tokens without changing the budget. Dispatch must use the weights returned here: the
    gradient that reaches them is the one salience is computed from.
    """
    return weights_NK, masked_mean((importance_N - 0.5) ** 2, valid_N)


def _forward(
    weights_NK: Array, importance_N: Array, valid_N: Array, groups: int
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    return rank_by_salience.run(weights_NK, importance_N, valid_N, groups), (weights_NK, importance_N, valid_N)


def _backward(groups: int, saved: tuple[Array, Array, Array], grads: tuple[Array, Array]) -> tuple[Array, Array, None]:
    weights_NK, importance_N, valid_N = saved
    weights_grad_NK, loss_grad = grads
    # weight * dL/dweight is the first-order change of the loss when that expert's output is scaled. It is squared per
    # slot before the sum, so that experts with opposite effects do not cancel.
    salience_N = jnp.square(weights_NK * weights_grad_NK).sum(axis=1)
    rank_N = midranks(salience_N.reshape(groups, -1), valid_N.reshape(groups, -1)).reshape(-1)
    tokens = jnp.maximum(valid_N.sum(dtype=jnp.float32), 1)
    return weights_grad_NK, jnp.where(valid_N, 2 * loss_grad * (importance_N - rank_N) / tokens, 0), None


rank_by_salience.defvjp(
    _forward,
    _backward,
    definition=rank_by_salience.run,
    refusal="importance_regulariser='salience' knows a token's rank in the backward pass only: use jax.grad, or "
    "another regulariser for jvp and jacfwd",
    # The definition's derivative would treat every rank as 1/2; the ranks exist in `_backward` only.
    plain_backward=True,
)


def midranks(values_GM: Float[Array, "*G M"], valid_GM: Bool[Array, "*G M"]) -> Float[Array, "*G M"]:
    """For each value, the share of its group's valid values below it, counting equal ones half: in (0, 1), with mean
    1/2. Undefined where not valid.

    Two sorts, because a comparison of all pairs would take M^2 memory, and the inverse of a permutation by sorting
    needs no scatter.
    """
    size = values_GM.shape[-1]
    places_GM = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), values_GM.shape)
    keys_GM = jnp.where(valid_GM, values_GM, jnp.inf)  # invalid values sort last, and so never count as below
    sorted_GM, from_GM = jax.lax.sort((keys_GM, places_GM), dimension=-1, num_keys=1, is_stable=False)
    # A run of equal values starts where a value differs from its predecessor. All of its members get the middle of the
    # run as their rank: which of them sorts first is arbitrary, and saliences of exactly 0 are common.
    changes_GM = sorted_GM[..., 1:] != sorted_GM[..., :-1]
    edge = jnp.ones((*sorted_GM.shape[:-1], 1), bool)
    opens_GM, closes_GM = jnp.concatenate([edge, changes_GM], -1), jnp.concatenate([changes_GM, edge], -1)
    axis = sorted_GM.ndim - 1
    first_GM = jax.lax.cummax(jnp.where(opens_GM, places_GM, 0), axis)
    past_GM = jax.lax.cummin(jnp.where(closes_GM, places_GM + 1, size), axis, reverse=True)
    _, twice_GM = jax.lax.sort((from_GM, first_GM + past_GM), dimension=-1, num_keys=1, is_stable=False)
    count_G1 = valid_GM.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    return twice_GM.astype(jnp.float32) / (2 * jnp.maximum(count_G1, 1))

"""The training loss: cross entropy of the answer plus the router's auxiliary losses."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.routing.trace import layer_mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """Teacher-forced scores of each row's answers, as sums, which add up over batches without bias."""

    loss_B: Float[Array, "B"]  # float32 cross entropy in nats, summed over the answers' tokens
    tokens_B: Int[Array, "B"]  # answer tokens, EOS included
    correct_B: Int[Array, "B"]  # answer tokens that were the most likely ones
    answers_B: Int[Array, "B"]  # segments that have an answer
    exact_B: Int[Array, "B"]  # answers with every token correct


def answer_scores(
    logits_BTY: Float[Array, "B T Y"],
    tokens_BT: Int[ArrayLike, "B T"],
    loss_mask_BT: Bool[ArrayLike, "B T"],
    segment_BT: Int[ArrayLike, "B T"] | None = None,
) -> AnswerScores:
    """Scores of the tokens that `loss_mask_BT` marks: if it is True at t, logits[t] predict tokens[t + 1].

    Everything is computed in float32 whatever the logits' dtype. At the end of a segment, and at the last position, the
    mask is taken as False: the next token belongs to another example.

    Args:
      segment_BT: see `Batch`. None: a row is one segment.
    """
    logits_BTY = logits_BTY.astype(jnp.float32)
    next_BT = jnp.roll(jnp.asarray(tokens_BT), -1, axis=1)
    segment_BT = jnp.zeros(next_BT.shape, jnp.int32) if segment_BT is None else jnp.asarray(segment_BT)
    ends_BT, mask_BT = _segment_ends(segment_BT), predicting_positions(loss_mask_BT, segment_BT)
    nats_BT = next_token_nats(logits_BTY, tokens_BT)
    correct_BT = mask_BT & (jnp.argmax(logits_BTY, axis=-1) == next_BT)
    has_answer_BT = ends_BT & (_count_in_segment(mask_BT, ends_BT) > 0)
    has_mistake_BT = _count_in_segment(mask_BT & ~correct_BT, ends_BT) > 0
    return AnswerScores(
        loss_B=jnp.where(mask_BT, nats_BT, 0.0).sum(axis=1),
        tokens_B=mask_BT.sum(axis=1),
        correct_B=correct_BT.sum(axis=1),
        answers_B=has_answer_BT.sum(axis=1),
        exact_B=(has_answer_BT & ~has_mistake_BT).sum(axis=1),
    )


def next_token_nats(logits_BTY: Float[Array, "B T Y"], tokens_BT: Int[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """The float32 cross entropy of the token after each position; of a row's last one it means nothing."""
    logits_BTY = logits_BTY.astype(jnp.float32)
    next_BT = jnp.roll(jnp.asarray(tokens_BT), -1, axis=1)
    target_BT = jnp.take_along_axis(logits_BTY, next_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTY, axis=-1) - target_BT


def predicting_positions(loss_mask_BT: Bool[ArrayLike, "B T"], segment_BT: Int[ArrayLike, "B T"]) -> Bool[Array, "B T"]:
    """`loss_mask_BT`, restricted to positions whose next position is in the same segment."""
    return jnp.asarray(loss_mask_BT) & ~_segment_ends(jnp.asarray(segment_BT))


def _segment_ends(segment_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last position of each segment."""
    return (segment_BT != jnp.roll(segment_BT, -1, axis=1)).at[:, -1].set(True)


def _count_in_segment(flags_BT: Bool[Array, "B T"], ends_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of flags in a position's segment up to and including the position."""
    counts_BT = jnp.cumsum(flags_BT, axis=1)
    before_BT = jnp.roll(jnp.where(ends_BT, counts_BT, 0), 1, axis=1).at[:, 0].set(0)
    return counts_BT - jax.lax.cummax(before_BT, axis=1)


def auxiliary_loss(config: AnyExpertsConfig, losses: dict[str, Float[Array, " L"]]) -> Float[Array, ""]:
    """The weighted sum of the router's losses "balance", "importance" and "z", each averaged over the L MoE layers.

    Losses of other names must be weighted already. The average makes the weights (AnyExperts: 0.01 and 0.001) mean the
    same at any depth; the paper does not say (our reading).
    """
    weights = {"balance": config.balance_weight, "importance": config.importance_weight, "z": config.z_weight}
    return jnp.asarray(sum(weights.get(name, 1.0) * layer_mean(loss) for name, loss in losses.items()), jnp.float32)

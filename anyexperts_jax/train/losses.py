"""The loss: cross entropy of the answer, plus the router's auxiliary losses."""

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
    """Teacher-forced scores of each sequence's answer, as sums: they add up over batches without bias."""

    loss_B: Float[Array, "B"]  # float32 cross entropy in nats, summed over the answer's tokens
    tokens_B: Int[Array, "B"]  # answer tokens, EOS included
    correct_B: Int[Array, "B"]  # of which the most likely token was right
    exact_B: Bool[Array, "B"]  # all of them right; False where there is no answer


def answer_scores(
    logits_BTY: Float[Array, "B T Y"], tokens_BT: Int[ArrayLike, "B T"], loss_mask_BT: Bool[ArrayLike, "B T"]
) -> AnswerScores:
    """Scores of the tokens that `loss_mask_BT` marks: where it is True at t, logits[t] are to predict tokens[t + 1].

    Everything is float32 whatever the logits' dtype. The mask's last position must be False: nothing follows it.
    """
    logits_BTY = logits_BTY.astype(jnp.float32)
    next_BT = jnp.roll(jnp.asarray(tokens_BT), -1, axis=1)
    mask_BT = jnp.asarray(loss_mask_BT).at[:, -1].set(False)
    target_BT = jnp.take_along_axis(logits_BTY, next_BT[..., None], axis=-1)[..., 0]
    nats_BT = jax.nn.logsumexp(logits_BTY, axis=-1) - target_BT
    correct_BT = mask_BT & (jnp.argmax(logits_BTY, axis=-1) == next_BT)
    tokens_B, correct_B = mask_BT.sum(axis=1), correct_BT.sum(axis=1)
    return AnswerScores(
        loss_B=jnp.where(mask_BT, nats_BT, 0.0).sum(axis=1),
        tokens_B=tokens_B,
        correct_B=correct_B,
        exact_B=(correct_B == tokens_B) & (tokens_B > 0),
    )


def auxiliary_loss(config: AnyExpertsConfig, losses: dict[str, Float[Array, " L"]]) -> Float[Array, ""]:
    """The weighted sum of the router's losses "balance", "importance" and "z", each a mean over the L MoE layers.

    A loss of another name has its weight in it.

    A mean, so that the weights (AnyExperts: 0.01 and 0.001) mean the same at any depth; the paper does not say (our
    reading).
    """
    weights = {"balance": config.balance_weight, "importance": config.importance_weight, "z": config.z_weight}
    return jnp.asarray(sum(weights.get(name, 1.0) * layer_mean(loss) for name, loss in losses.items()), jnp.float32)

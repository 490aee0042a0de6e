"""Direct preference optimisation (DPO, arXiv 2305.18290): the better of two answers becomes the likelier one.

A row holds pairs of segments: an even segment is the conversation with the better answer, the odd one after it the same
with the worse one (`data.turns.encode_pair`). The reference is the model as the run began, as `train.distillation`
keeps it: a low-rank adapter begins at zero, so beside one the reference is the base itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.train.losses import next_token_nats, predicting_positions


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceSums:
    """Scores summed over pairs. A reward is beta times an answer's log probability, less the reference's."""

    loss: Float[Array, ""]  # -log sigmoid(margin), in nats
    margin: Float[Array, ""]  # the reward of the better answer less that of the worse one
    right: Int[Array, ""]  # pairs whose margin is positive
    pairs: Int[Array, ""]


def preference_sums(
    model_BTY: Float[Array, "B T Y"], reference_BTY: Float[Array, "B T Y"], batch: Batch, beta: float
) -> PreferenceSums:
    """Computes the DPO loss and its margins in float32, summed over the pairs of a batch.

    Args:
      model_BTY: logits of the trained model.
      reference_BTY: logits of the model at the beginning of the run.
      beta: the larger it is, the nearer the model stays to the reference.
    """
    mask_BT = predicting_positions(batch.loss_mask_BT, batch.segment_BT)
    more_BT = next_token_nats(reference_BTY, batch.tokens_BT) - next_token_nats(model_BTY, batch.tokens_BT)
    signed_BT = jnp.where(mask_BT, jnp.where(_is_worse(batch), -more_BT, more_BT), 0.0)
    margin_BX = beta * _by_pair(signed_BT, batch)
    there_BX = _pairs(batch)
    return PreferenceSums(
        loss=jnp.where(there_BX, jax.nn.softplus(-margin_BX), 0.0).sum(),
        margin=jnp.where(there_BX, margin_BX, 0.0).sum(),
        right=(there_BX & (margin_BX > 0)).sum(),
        pairs=there_BX.sum(),
    )


def count_pairs(batch: Batch) -> Int[Array, ""]:
    """Counts the pairs of a batch; padding rows have none."""
    return _pairs(batch).sum()


def better_alone(batch: Batch) -> Batch:
    """Returns the batch with only the better answers in the loss."""
    return dataclasses.replace(batch, loss_mask_BT=jnp.asarray(batch.loss_mask_BT) & ~_is_worse(batch))


def _is_worse(batch: Batch) -> Bool[Array, "B T"]:
    return jnp.asarray(batch.segment_BT) % 2 == 1


def _pairs(batch: Batch) -> Bool[Array, "B X"]:
    """Marks the pairs that exist: those with tokens of a worse answer."""
    mask_BT = predicting_positions(batch.loss_mask_BT, batch.segment_BT) & _is_worse(batch)
    return _by_pair(mask_BT.astype(jnp.float32), batch) > 0


def _by_pair(values_BT: Float[Array, "B T"], batch: Batch) -> Float[Array, "B X"]:
    """Sums the values over the positions of each pair."""
    pair_BT = jnp.asarray(batch.segment_BT) // 2
    most = -(-values_BT.shape[1] // 2)  # a segment has at least one position
    return jax.vmap(lambda values_T, pair_T: jax.ops.segment_sum(values_T, pair_T, most))(values_BT, pair_BT)

"""What a step minimises beside the router's losses: answers, a teacher's share of them, or preferences."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.train.config import TrainConfig
from anyexperts_jax.train.distillation import divergence, hidden_distance
from anyexperts_jax.train.losses import answer_scores, predicting_positions
from anyexperts_jax.train.metrics import RoutingSums, routing_sums
from anyexperts_jax.train.preference import PreferenceSums, better_alone, count_pairs, preference_sums


@dataclasses.dataclass(frozen=True)
class Objective:
    """The default is the cross entropy of the answers."""

    distillation: float = 0.0  # share of the loss that is the divergence from the teacher
    hidden: float = 0.0  # weight of the distance between hidden states, beside it
    beta: float | None = None  # of the DPO loss, in the place of all others

    @classmethod
    def of(cls, train: TrainConfig) -> "Objective":
        beta = train.dpo_beta if train.loss == "dpo" else None
        return cls(train.distillation, train.hidden_distillation, beta)

    @property
    def compares(self) -> bool:
        """Whether the loss needs the outputs of the model at the beginning of the run."""
        return bool(self.distillation) or self.beta is not None


ANSWERS = Objective()


class Outputs(NamedTuple):
    """The outputs of a model; `hidden` is the stream after each block, [*layers, B, T, D], if it is needed."""

    logits_BTY: Float[Array, "B T Y"]
    trace: RoutingTrace
    hidden: Any = ()


class Totals(NamedTuple):
    """The denominators of a loss, of the whole batch.

    Averaging the means of micro-batches would weight them alike, although they have different numbers of answer tokens.
    """

    answer_tokens: Float[Array, ""]
    valid_tokens: Int[Array, ""]
    pairs: Float[Array, ""]  # of preferences


@register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchSums:
    """Scores summed over one or more batches."""

    answer_loss: Float[Array, ""]  # nats
    answer_tokens: Int[Array, ""]
    correct_tokens: Int[Array, ""]
    exact_answers: Int[Array, ""]
    answers: Int[Array, ""]  # segments that have an answer; rows that pad a batch have none
    routing: RoutingSums
    preference: PreferenceSums | None = None  # with the DPO loss; the scores above are then of the better answers


def batch_sums(logits_BTY: Float[Array, "B T Y"], trace: RoutingTrace, batch: Batch) -> BatchSums:
    scores = answer_scores(logits_BTY, batch.tokens_BT, batch.loss_mask_BT, batch.segment_BT)
    return BatchSums(
        answer_loss=scores.loss_B.sum(),
        answer_tokens=scores.tokens_B.sum(),
        correct_tokens=scores.correct_B.sum(),
        exact_answers=scores.exact_B.sum(),
        answers=scores.answers_B.sum(),
        routing=routing_sums(trace, batch),
    )


def objective_sums(objective: Objective, ours: Outputs, theirs: Outputs | None, batch: Batch) -> BatchSums:
    """Sums the scores of a batch. Preferences need `theirs`, the outputs of the model at the beginning of the run."""
    if objective.beta is None:
        return batch_sums(ours.logits_BTY, ours.trace, batch)
    assert theirs is not None
    sums = batch_sums(ours.logits_BTY, ours.trace, better_alone(batch))
    found = preference_sums(ours.logits_BTY, theirs.logits_BTY, batch, objective.beta)
    return dataclasses.replace(sums, preference=found)


def totals(objective: Objective, batch: Batch) -> Totals:
    """Returns the denominators of a whole batch, each at least 1."""
    learned = batch if objective.beta is None else better_alone(batch)
    answer_tokens = jnp.maximum(jnp.sum(predicting_positions(learned.loss_mask_BT, learned.segment_BT)), 1)
    pairs = jnp.maximum(0 if objective.beta is None else count_pairs(batch), 1).astype(jnp.float32)
    valid_tokens = jnp.maximum(jnp.sum(jnp.asarray(batch.valid_BT)), 1)
    return Totals(answer_tokens.astype(jnp.float32), valid_tokens, pairs)


def objective_loss(
    objective: Objective, ours: Outputs, theirs: Outputs | None, batch: Batch, whole: Totals
) -> tuple[Float[Array, ""], BatchSums, dict[str, Float[Array, ""]]]:
    """Returns a micro-batch's part of the batch's loss, its sums, and its parts of the terms to report.

    Args:
      whole: the denominators of the whole batch.
    """
    sums = objective_sums(objective, ours, theirs, batch)
    terms = {"answer_loss": sums.answer_loss / whole.answer_tokens}
    if sums.preference is not None:
        pairs, found = whole.pairs, sums.preference
        terms["preference_loss"] = found.loss / pairs
        terms["reward_margin"] = found.margin / pairs
        terms["preference_accuracy"] = found.right.astype(jnp.float32) / pairs
        return terms["preference_loss"], sums, terms
    loss = terms["answer_loss"]
    if objective.distillation:
        assert theirs is not None
        mask_BT = predicting_positions(batch.loss_mask_BT, batch.segment_BT)
        nats = divergence(theirs.logits_BTY, ours.logits_BTY, mask_BT)
        terms["distillation_loss"] = nats / whole.answer_tokens
        loss = (1 - objective.distillation) * loss + objective.distillation * terms["distillation_loss"]
        if objective.hidden:
            terms["hidden_loss"] = hidden_distance(theirs.hidden, ours.hidden, mask_BT) / whole.answer_tokens
            loss = loss + objective.hidden * terms["hidden_loss"]
    return loss, sums, terms

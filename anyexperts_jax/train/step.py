"""The train step and the evaluation step, as pure functions of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import ModelOutput, MultimodalModel
from anyexperts_jax.models.paths import any_of
from anyexperts_jax.routing.bias import update_expert_bias
from anyexperts_jax.routing.trace import RoutingTrace, layer_mean
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import replicated
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.curriculum import budget_windows, draw_budget
from anyexperts_jax.train.distillation import divergence, teacher_params
from anyexperts_jax.train.frozen import overlay, select
from anyexperts_jax.train.losses import answer_scores, auxiliary_loss, predicting_positions
from anyexperts_jax.train.metrics import RoutingSums, routing_sums
from anyexperts_jax.train.optim import apply_updates, learning_rate
from anyexperts_jax.train.state import TrainState, state_shardings

# In the order in which the first scalar that is not finite is reported.
CHECKED_SCALARS = ("answer_loss", "balance_loss", "importance_loss", "z_loss", "loss", "grad_norm")


# The model as a function of parameters, batch, expert biases, random key (None: nothing is random) and window (None:
# the configuration's). It returns logits [B, T, Y] and the trace stacked over layers.
Apply = Callable[[Any, Batch, Array, Array | None, Array | None], tuple[Array, RoutingTrace]]


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


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StepReport:
    """The metrics of a step."""

    scalars: dict[str, Float[Array, ""]]
    routing: RoutingSums
    finite: Bool[Array, ""]  # False: the step changed only the step count


def model_apply(config: ModelConfig, placement: Placement | None = None) -> Apply:
    """`MultimodalModel(config, placement)` as a function."""
    model = MultimodalModel(config, placement)

    def apply(
        params: Any, batch: Batch, router_bias_LC: Array, key: Array | None, window: Array | None
    ) -> tuple[Float[Array, "B T Y"], RoutingTrace]:
        rngs = None if key is None else {"routing": key}
        output = cast(
            ModelOutput,
            model.apply({"params": params}, batch, router_bias_LC=router_bias_LC, window=window, rngs=rngs),
        )
        return output.logits_BTY, output.trace

    return apply


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


def make_eval_step(apply: Apply) -> Callable[..., BatchSums]:
    """The teacher-forced evaluation of one batch: f(params, router_bias_LC, batch, window=None)."""

    def eval_step(params: Any, router_bias_LC: Array, batch: Batch, window: Array | None = None) -> BatchSums:
        logits_BTY, trace = apply(params, batch, router_bias_LC, None, window)
        return batch_sums(logits_BTY, trace, batch)

    return eval_step


def make_train_step(
    config: RunConfig, optimizer: optax.GradientTransformationExtraArgs, apply: Apply, trainable: Any = None
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """The train step as a pure function of state and batch.

    The loss is the cross entropy per answer token of the whole batch, however many micro-batches it is divided into,
    plus `auxiliary_loss`. The latter weights micro-batches by their valid tokens, which is exact for the importance and
    z losses; the balance loss is computed per micro-batch. With `train.distillation`, that share of the cross entropy
    is replaced by the divergence from the teacher at the same positions. Randomness depends only on the seed, the step
    and the micro-batch; the budget drawn from `train.budgets` depends only on the seed and the step. If a loss or the
    gradient's norm is not finite, only the step count changes.

    Args:
      optimizer: its `update` takes `learning_rate` and `finite`; if that is False it must not change its state, like
        the optimizer of `make_optimizer`.
      trainable: a tree of bools. Parameters at False do not change by a bit and have no gradient; the optimizer must
        be `frozen.train_only(optimizer, trainable)`. None: all are trained.
    """
    moe, train = config.model.moe, config.train
    budgets, windows = train.budgets, budget_windows(config.model, train.budgets)
    # Expert biases are part of the routing: if all routers are frozen, they do not move.
    moves_bias = moe.expert_bias and config.model.stack.num_moe_layers > 0 and any_of("router", trainable)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        # The key is derived from the step and not kept in the state, so that a resumed run draws the same numbers.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        drawn, window = draw_budget(budgets, windows, config.seed, state.step) if budgets else (None, None)
        grads, sums, losses = accumulate(
            apply,
            moe,
            train.accumulation,
            state=state,
            batch=batch,
            key=key,
            trainable=trainable,
            window=window,
            distillation=train.distillation,
        )
        scalars = {
            **losses,
            **({} if drawn is None else {"budget": drawn}),
            "grad_norm": optax.tree.norm(grads).astype(jnp.float32),
            "learning_rate": learning_rate(config.optim, train.steps, state.step),
            "token_accuracy": sums.correct_tokens / jnp.maximum(sums.answer_tokens, 1),
            "exact_match": sums.exact_answers / jnp.maximum(sums.answers, 1),
        }
        # The gradient's norm is not finite if any gradient is not, so checking the scalars covers every parameter.
        finite = jnp.all(jnp.isfinite(jnp.stack([scalars[name] for name in CHECKED_SCALARS])))
        steering = {"learning_rate": scalars["learning_rate"], "finite": finite}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **steering)
        params = overlay(apply_updates(select(state.params, trainable), updates), state.params)
        bias_LC = state.router_bias_LC
        if moves_bias:
            bias_LC = update_expert_bias(bias_LC, sums.routing.load_LC, moe.expert_bias_rate)
        # A select and not a `cond`: it needs no host round trip, and XLA fuses it into the update.
        params, bias_LC = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, bias_LC), (state.params, state.router_bias_LC)
        )
        return TrainState(state.step + 1, params, opt_state, bias_LC), StepReport(scalars, sums.routing, finite)

    return train_step


def jit_train_step(
    config: RunConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    apply: Apply,
    mesh: Mesh,
    trainable: Any = None,
) -> Any:
    """`make_train_step`, jitted for a run: the state is donated, so that it is updated in place, and keeps its
    shardings.
    """
    return jax.jit(
        make_train_step(config, optimizer, apply, trainable),
        donate_argnums=0,
        out_shardings=(state_shardings(config.model, optimizer, mesh), replicated(mesh)),
    )


def accumulate(
    apply: Apply,
    moe: AnyExpertsConfig,
    parts: int,
    state: TrainState,
    batch: Batch,
    key: Array,
    trainable: Any = None,
    window: Float[Array, "2"] | None = None,
    distillation: float = 0.0,
) -> tuple[Any, BatchSums, dict[str, Array]]:
    """The float32 gradient of the trainable parameters, the sums and the losses of a batch in `parts` micro-batches.

    Args:
      window: (k_min, k_max) in place of the configuration's; not for the teacher.
      distillation: the share of the loss that is the teacher's; if not 0, the optimiser keeps one.
    """
    live = select(state.params, trainable)
    # Denominators are those of the whole batch. Averaging the means of micro-batches would weight them alike, although
    # they have different numbers of answer tokens.
    answer_tokens = jnp.maximum(jnp.sum(predicting_positions(batch.loss_mask_BT, batch.segment_BT)), 1)
    valid_tokens = jnp.maximum(jnp.sum(jnp.asarray(batch.valid_BT)), 1)

    def micro_loss(live: Any, micro: Batch, key: Array) -> tuple[Array, tuple[BatchSums, dict[str, Array]]]:
        logits_BTY, trace = apply(overlay(live, state.params), micro, state.router_bias_LC, key, window)
        sums = batch_sums(logits_BTY, trace, micro)
        share = jnp.sum(jnp.asarray(micro.valid_BT)) / valid_tokens
        answer_loss = sums.answer_loss / answer_tokens.astype(jnp.float32)
        terms = {f"{name}_loss": share * layer_mean(value) for name, value in trace.losses.items()}
        learned = answer_loss
        if distillation:
            teacher = teacher_params(state.opt_state, state.params)
            theirs_BTY, _ = apply(teacher, micro, state.router_bias_LC, None, None)
            mask_BT = predicting_positions(micro.loss_mask_BT, micro.segment_BT)
            terms["distillation_loss"] = divergence(theirs_BTY, logits_BTY, mask_BT) / answer_tokens.astype(jnp.float32)
            learned = (1 - distillation) * answer_loss + distillation * terms["distillation_loss"]
        loss = learned + share * auxiliary_loss(moe, trace.losses)
        return loss, (sums, {"loss": loss, "answer_loss": answer_loss, **terms})

    def part(micro: Batch, index: Array | int) -> tuple[Any, BatchSums, dict[str, Array]]:
        grads, (sums, losses) = jax.grad(micro_loss, has_aux=True)(live, micro, jax.random.fold_in(key, index))
        # bfloat16 gradients would lose small contributions when micro-batches are added up.
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums, losses

    if parts == 1:
        return part(batch, 0)

    def add_part(total: Any, indexed: tuple[Array, Batch]) -> tuple[Any, None]:
        index, micro = indexed
        return jax.tree.map(jnp.add, total, part(micro, index)), None

    micros = split_batch(batch, parts)
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], micros), 0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add_part, zeros, (jnp.arange(parts), micros))[0]


def split_batch(batch: Batch, parts: int) -> Batch:
    """Splits the batch into `parts` micro-batches along a new leading axis.

    Micro-batch i has the sequences i, i + parts, ... On a mesh, where devices hold contiguous sequences, every device
    then has a part of every micro-batch, and no sequence moves.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(jnp.reshape(x, (x.shape[0] // parts, parts, *x.shape[1:])), 1, 0), batch)

"""The train step and the evaluation step, as pure functions of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import ModelOutput, MultimodalModel
from anyexperts_jax.models.paths import any_of
from anyexperts_jax.nn.block import STREAM
from anyexperts_jax.routing.bias import update_expert_bias
from anyexperts_jax.routing.trace import RoutingTrace, layer_mean
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import replicated
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.curriculum import budget_windows, draw_budget
from anyexperts_jax.train.distillation import teacher_params
from anyexperts_jax.train.frozen import overlay, select
from anyexperts_jax.train.losses import auxiliary_loss
from anyexperts_jax.train.metrics import RoutingSums
from anyexperts_jax.train.objective import (
    ANSWERS,
    BatchSums,
    Objective,
    Outputs,
    objective_loss,
    objective_sums,
    totals,
)
from anyexperts_jax.train.optim import apply_updates, learning_rate
from anyexperts_jax.train.state import TrainState, state_shardings

# In the order in which the first scalar that is not finite is reported.
CHECKED_SCALARS = ("answer_loss", "balance_loss", "importance_loss", "z_loss", "loss", "grad_norm")


# The model as a function of parameters, batch, expert biases, random key (None: nothing is random) and window (None:
# the configuration's). It returns logits [B, T, Y] and the trace stacked over layers.
Apply = Callable[[Any, Batch, Array, Array | None, Array | None], tuple[Array, RoutingTrace]]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StepReport:
    """The metrics of a step."""

    scalars: dict[str, Float[Array, ""]]
    routing: RoutingSums
    finite: Bool[Array, ""]  # False: the step changed only the step count


def model_apply(config: ModelConfig, placement: Placement | None = None) -> Apply:
    """`MultimodalModel(config, placement)` as a function."""
    run = _model_run(config, placement)

    def apply(
        params: Any, batch: Batch, router_bias_LC: Array, key: Array | None, window: Array | None
    ) -> tuple[Float[Array, "B T Y"], RoutingTrace]:
        output = cast(ModelOutput, run(params, batch, router_bias_LC, key, window))
        return output.logits_BTY, output.trace

    return apply


def hidden_apply(config: ModelConfig, placement: Placement | None = None) -> Callable[..., Outputs]:
    """`model_apply` that also returns the stream after every block."""
    run = _model_run(config, placement, mutable=[STREAM])

    def apply(params: Any, batch: Batch, router_bias_LC: Array, key: Array | None, window: Array | None) -> Outputs:
        output, found = run(params, batch, router_bias_LC, key, window)
        return Outputs(output.logits_BTY, output.trace, tuple(jax.tree.leaves(found[STREAM])))

    return apply


def _model_run(config: ModelConfig, placement: Placement | None, **how: Any) -> Callable[..., Any]:
    """The model's `apply`, with further arguments of Flax's, as a function of the arguments of an `Apply`."""
    model = MultimodalModel(config, placement)

    def run(params: Any, batch: Batch, router_bias_LC: Array, key: Array | None, window: Array | None) -> Any:
        rngs = None if key is None else {"routing": key}
        return model.apply({"params": params}, batch, router_bias_LC=router_bias_LC, window=window, rngs=rngs, **how)

    return run


def make_eval_step(apply: Apply, objective: Objective = ANSWERS) -> Callable[..., BatchSums]:
    """The teacher-forced evaluation of one batch: f(params, router_bias_LC, batch, window=None, reference=None).

    Args:
      objective: with the DPO loss, batches are preferences, and the function needs the reference's parameters.
    """

    def eval_step(
        params: Any, router_bias_LC: Array, batch: Batch, window: Array | None = None, reference: Any = None
    ) -> BatchSums:
        ours = Outputs(*apply(params, batch, router_bias_LC, None, window))
        theirs = None
        if objective.beta is not None:
            theirs = Outputs(*apply(reference, batch, router_bias_LC, None, window))
        return objective_sums(objective, ours, theirs, batch)

    return eval_step


def make_train_step(
    config: RunConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    apply: Apply,
    trainable: Any = None,
    placement: Placement | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """The train step as a pure function of state and batch.

    The loss is the cross entropy per answer token of the whole batch, however many micro-batches it is divided into,
    plus `auxiliary_loss`. The latter weights micro-batches by their valid tokens, which is exact for the importance and
    z losses; the balance loss is computed per micro-batch. With `train.distillation`, that share of the cross entropy
    is replaced by the divergence from the teacher at the same positions; with `train.loss="dpo"` all of it by the DPO
    loss, per pair of the whole batch. Randomness depends only on the seed, the step and the micro-batch; the budget
    drawn from `train.budgets` depends only on the seed and the step. If a loss or the gradient's norm is not finite,
    only the step count changes.

    Args:
      optimizer: its `update` takes `learning_rate` and `finite`; if that is False it must not change its state, like
        the optimizer of `make_optimizer`.
      trainable: a tree of bools. Parameters at False do not change by a bit and have no gradient; the optimizer must
        be `frozen.train_only(optimizer, trainable)`. None: all are trained.
      placement: of the arrays, for `train.hidden_distillation`, which runs `hidden_apply` in the place of `apply`.
    """
    moe, train = config.model.moe, config.train
    objective = Objective.of(train)
    run: Callable[..., tuple[Any, ...]] = hidden_apply(config.model, placement) if objective.hidden else apply
    budgets, windows = train.budgets, budget_windows(config.model, train.budgets)
    # Expert biases are part of the routing: if all routers are frozen, they do not move.
    moves_bias = moe.expert_bias and config.model.stack.num_moe_layers > 0 and any_of("router", trainable)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        # The key is derived from the step and not kept in the state, so that a resumed run draws the same numbers.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        drawn, window = draw_budget(budgets, windows, config.seed, state.step) if budgets else (None, None)
        grads, sums, losses = accumulate(
            run,
            moe,
            train.accumulation,
            state=state,
            batch=batch,
            key=key,
            trainable=trainable,
            window=window,
            objective=objective,
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
        make_train_step(config, optimizer, apply, trainable, Placement(mesh)),
        donate_argnums=0,
        out_shardings=(state_shardings(config.model, optimizer, mesh), replicated(mesh)),
    )


def accumulate(
    apply: Callable[..., tuple[Any, ...]],
    moe: AnyExpertsConfig,
    parts: int,
    state: TrainState,
    batch: Batch,
    key: Array,
    trainable: Any = None,
    window: Float[Array, "2"] | None = None,
    objective: Objective = ANSWERS,
) -> tuple[Any, BatchSums, dict[str, Array]]:
    """The float32 gradient of the trainable parameters, the sums and the losses of a batch in `parts` micro-batches.

    Args:
      apply: the model, as `Apply`, or as `hidden_apply` gives it.
      window: (k_min, k_max) in place of the configuration's; not for a teacher, but for the reference of a preference.
      objective: where it compares, the optimiser's state is a `TaughtState`.
    """
    live, whole = select(state.params, trainable), totals(objective, batch)

    def micro_loss(live: Any, micro: Batch, key: Array) -> tuple[Array, tuple[BatchSums, dict[str, Array]]]:
        ours, theirs = Outputs(*apply(overlay(live, state.params), micro, state.router_bias_LC, key, window)), None
        if objective.compares:
            start = teacher_params(state.opt_state, state.params)
            its_window = None if objective.beta is None else window
            theirs = Outputs(*apply(start, micro, state.router_bias_LC, None, its_window))
        learned, sums, terms = objective_loss(objective, ours, theirs, micro, whole)
        share = jnp.sum(jnp.asarray(micro.valid_BT)) / whole.valid_tokens
        terms |= {f"{name}_loss": share * layer_mean(value) for name, value in ours.trace.losses.items()}
        loss = learned + share * auxiliary_loss(moe, ours.trace.losses)
        return loss, (sums, {"loss": loss, **terms})

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

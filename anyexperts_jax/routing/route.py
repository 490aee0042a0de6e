"""`route`: from router and importance logits to a `RoutingPlan`. Tokens interact in losses and metrics only."""

from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.arrays import as_array
from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require, shown
from anyexperts_jax.core.registries import REGULARISERS
from anyexperts_jax.core.remat import ROUTING
from anyexperts_jax.routing.importance import importance
from anyexperts_jax.routing.losses import routing_losses
from anyexperts_jax.routing.metrics import column_load, routing_metrics
from anyexperts_jax.routing.plan import RoutingPlan, plan_spec
from anyexperts_jax.routing.policies import IMPORTANCE
from anyexperts_jax.routing.regularisers import Importances
from anyexperts_jax.routing.scores import probabilities, ranking
from anyexperts_jax.routing.select import select
from anyexperts_jax.routing.slots import continuous_slots, policy_slots, round_slots
from anyexperts_jax.routing.weights import combine_weights
from anyexperts_jax.routing.window import Window, budget_in_force, check_window


def route(
    config: AnyExpertsConfig,
    logits_NC: Float[ArrayLike, "N C"],
    importance_logits_N: Float[ArrayLike, "N"],
    valid_N: Bool[ArrayLike, "N"] | None = None,
    bias_C: Float[ArrayLike, "*N C"] | None = None,
    *,
    window: Window | None = None,
    num_sequences: int = 1,
    batch_shards: int | None = None,
    key: Array | None = None,
    modality_N: Int[ArrayLike, "N"] | None = None,
) -> RoutingPlan:
    """Routes N tokens over C = E + V columns (AnyExperts section 2, steps 2 and 4 to 7). Computes in float32.

    Arrays may be JAX's, NumPy's of any float dtype, or nested lists.

    Args:
      config: the policy, with all its switches.
      logits_NC: finite router logits; the columns of the real experts come first.
      importance_logits_N: z, one scalar per token. Zeros suffice if the policy is static (not
        `config.uses_importance`).
      valid_N: False at padding, which gets no slots and does not count in losses and metrics. Default: all valid.
      bias_C: the expert bias, [C], or one per token, [N, C]; required if `config.expert_bias`, and an error otherwise.
      window: (k_min, k_max) to use instead of the config's, as in `window=(4, 8)`. A traced array gives one compiled
        program for every budget within `slots_bound`, but buffers of a fixed size then follow the config's budget.
      num_sequences: the tokens are num_sequences contiguous sequences of equal length. Needed for
        balance_scope="sequence", and for dispatch, which drops the latest positions of all sequences first.
      batch_shards: the number of parts into which devices split the sequences; for salience_scope="device" only.
      key: random key; required for slot_rounding="stochastic" and unused otherwise.
      modality_N: core.modality.Modality of each token, for policies that tell them apart. Default: all are text.

    Raises:
      UserError: for shapes that do not fit the config or each other; if bias_C, key or batch_shards is missing, or
        bias_C is given without need; for a window that is reversed, not finite or out of reach.

    Example:
        >>> import anyexperts_jax as ax, numpy as np
        >>> config = ax.AnyExpertsConfig(num_experts=8, num_virtual=2, k_min=2, k_max=4)
        >>> logits_NC = np.random.default_rng(0).normal(size=(16, config.num_columns))
        >>> plan = ax.route(config, logits_NC, np.zeros(16))  # importance 1/2: three slots per token
        >>> plan.expert_ids_NK.shape, int(plan.slots_N.sum())
        ((16, 4), 48)
    """
    require(isinstance(config, AnyExpertsConfig), f"config={shown(config)} must be an AnyExpertsConfig")
    given = _Given(
        as_array("logits_NC", logits_NC),
        as_array("importance_logits_N", importance_logits_N),
        None if valid_N is None else as_array("valid_N", valid_N),
        None if bias_C is None else as_array("bias_C", bias_C),
        None if modality_N is None else as_array("modality_N", modality_N),
    )
    _check_inputs(config, given, num_sequences)
    _check_key(key)
    return _route(config, given, window, num_sequences=num_sequences, batch_shards=batch_shards, key=key)


def _route(
    config: AnyExpertsConfig,
    given: "_Given",
    window: Window | None,
    *,
    num_sequences: int,
    batch_shards: int | None,
    key: Array | None,
) -> RoutingPlan:
    """`route` on checked arrays."""
    in_force = None if window is None else check_window(config, window)
    N = given.logits_NC.shape[0]
    valid_N = jnp.ones(N, bool) if given.valid_N is None else given.valid_N
    # Padding may hold anything, even NaN. Zeroing it here keeps NaN out of the forward and the backward pass: masking
    # the results would not be enough, since 0 * NaN is NaN in a gradient.
    logits_NC = jnp.where(valid_N[:, None], given.logits_NC.astype(jnp.float32), 0)
    importance_logits_N = jnp.where(valid_N, given.importance_logits_N.astype(jnp.float32), 0)
    bias_C = None if given.bias_C is None else given.bias_C.astype(jnp.float32)

    importance_N = importance(importance_logits_N)
    probabilities_NC = probabilities(config, logits_NC)
    if config.policy == IMPORTANCE:
        continuous_N = continuous_slots(config, importance_N, window)
    else:
        continuous_N = policy_slots(config, logits_NC, probabilities_NC, window, given.modality_N)
    slots_N = checkpoint_name(jnp.where(valid_N, round_slots(config, continuous_N, key), 0), ROUTING)
    selection = select(config, *ranking(config, logits_NC, importance_N, bias_C), slots_N)
    weights_NK, virtual_weight_N = combine_weights(config, logits_NC, importance_N, continuous_N, selection)

    load_SC = column_load(config, selection, num_sequences if config.switches.balance_scope == "sequence" else 1)
    losses = routing_losses(logits_NC, probabilities_NC, load_SC, valid_N)
    regularise = REGULARISERS[config.switches.importance_regulariser]
    seen = Importances(
        config,
        logits_N=importance_logits_N,
        importance_N=importance_N,
        weights_NK=weights_NK,
        valid_N=valid_N,
        num_sequences=num_sequences,
        batch_shards=batch_shards,
    )
    weights_NK, losses["importance"] = regularise(seen)
    return RoutingPlan(
        expert_ids_NK=jnp.where(selection.real_live_NK, selection.real_ids_NK, config.num_experts),
        weights_NK=weights_NK,
        virtual_weight_N=virtual_weight_N,
        importance_N=importance_N,
        slots_N=slots_N,
        real_slots_N=selection.real_slots_N,
        virtual_slots_N=selection.virtual_slots_N,
        losses=losses,
        metrics=routing_metrics(
            config, probabilities_NC, importance_N, selection, load_C=load_SC.sum(axis=0), valid_N=valid_N
        ),
        spec=plan_spec(config, budget_in_force(config, in_force), num_sequences),
    )


def _check_key(key: object) -> None:
    """Raises `UserError` unless `key` is None or a random key, of JAX's new or old kind."""
    if key is None:
        return
    new = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    old = isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1
    require(new or old, f"key={shown(key)} is no random key; pass jax.random.key(0)")


class _Given(NamedTuple):
    """The caller's arrays, as JAX arrays."""

    logits_NC: Array
    importance_logits_N: Array
    valid_N: Array | None
    bias_C: Array | None
    modality_N: Array | None


def _check_inputs(config: AnyExpertsConfig, given: _Given, num_sequences: Any) -> None:
    C, (logits_NC, importance_logits_N, valid_N, bias_C, modality_N) = config.num_columns, given
    require(
        logits_NC.ndim == 2 and logits_NC.shape[1] == C,
        f"logits_NC has shape {logits_NC.shape}; need [tokens, {C}], num_experts + num_virtual columns",
    )
    N = logits_NC.shape[0]
    require(
        importance_logits_N.shape == (N,),
        f"importance_logits_N has shape {importance_logits_N.shape}; need ({N},), one per row of logits_NC",
    )
    if valid_N is not None:
        require(
            valid_N.shape == (N,) and valid_N.dtype == bool,
            f"valid_N has shape {valid_N.shape} and dtype {valid_N.dtype}; need bool ({N},)",
        )
    if modality_N is not None:
        require(
            modality_N.shape == (N,) and jnp.issubdtype(modality_N.dtype, jnp.integer),
            f"modality_N has shape {modality_N.shape} and dtype {modality_N.dtype}; need whole numbers ({N},)",
        )
    if config.expert_bias:
        require(bias_C is not None, "expert_bias=True needs bias_C, one float per column")
    else:
        require(bias_C is None, "bias_C is given but expert_bias=False; set expert_bias=True or leave bias_C out")
    if bias_C is not None:
        fits = bias_C.shape in ((C,), (N, C))
        require(fits, f"bias_C has shape {bias_C.shape}; need ({C},), or ({N}, {C}), one for each token")
    require(isinstance(num_sequences, Integral), f"num_sequences={shown(num_sequences)} must be a whole number")
    require(
        num_sequences >= 1 and N % num_sequences == 0,
        f"num_sequences={num_sequences} must divide the number of tokens, {N}",
    )

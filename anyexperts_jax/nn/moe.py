"""The mixture-of-experts layer: its parameters. `routing` has the policy, `dispatch` the data movement, `ops` the
compute."""

import dataclasses
from typing import Any, get_args

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.arrays import as_array, as_floats
from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.initializers import Constant, FanIn
from anyexperts_jax.core.remat import ROUTER_LOGITS
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.dispatch.apply import apply_plan
from anyexperts_jax.dispatch.execution import Execution, require_capacity_for
from anyexperts_jax.dispatch.in_place import apply_in_place
from anyexperts_jax.nn.config import Dtype, LoraConfig
from anyexperts_jax.nn.importance import ImportanceMLP
from anyexperts_jax.nn.lora import WeightAxes, adapted, low_rank
from anyexperts_jax.nn.mlp import SwiGLU
from anyexperts_jax.nn.params import named
from anyexperts_jax.nn.router import Router, router_of
from anyexperts_jax.ops.experts import ExpertWeights, StackedExperts
from anyexperts_jax.routing.importance import importance, modulate
from anyexperts_jax.routing.onset import faded_logits
from anyexperts_jax.routing.plan import RoutingPlan
from anyexperts_jax.routing.route import Window, route
from anyexperts_jax.routing.routers.shuffle import shuffled_logits
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.routing.window import check_window
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import batch_shards


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEContext:
    """The inputs of a MoE layer other than the tokens. All fields are optional."""

    valid_BT: Bool[ArrayLike, "B T"] | None = None  # False at padding: no slots, no output, not counted in the losses
    modality_BT: Int[ArrayLike, "B T"] | None = None  # ids in [0, router_modalities), for routers and policies
    window: Window | Float[Array, "B T 2"] | None = None  # (k_min, k_max), or for each token; overrides the config's
    bias_C: Float[ArrayLike, "*M C"] | None = None  # the expert bias of loss-free balancing; required if `expert_bias`
    importance_logits_BT: Float[ArrayLike, "B T"] | None = None  # if the caller has computed them
    experts: StackedExperts | None = None  # this layer's among those of all layers, to be read there: `reads_in_place`


_KINDS: dict[str, tuple[Any, str]] = {"valid_BT": (jnp.bool_, "bools"), "modality_BT": (jnp.integer, "integers")}


def _checked(config: AnyExpertsConfig, context: Any, fields: dict[str, Any], shape: tuple[int, ...]) -> MoEContext:
    """The context with `fields` replaced, converted to JAX arrays and checked; `shape` is [B, T].

    Raises:
      UserError: for an unknown field, an array of another shape, or an invalid window.
    """
    context = MoEContext() if context is None else context
    require(isinstance(context, MoEContext), f"context is a {type(context).__name__}; it must be a MoEContext")
    names = [field.name for field in dataclasses.fields(MoEContext)]
    for name in fields:
        require_one_of("argument", name, names)
    given = {name: getattr(context, name) for name in names} | fields
    window, experts = given.pop("window"), given.pop("experts")
    if window is not None and getattr(window, "ndim", 1) == 3:
        require(window.shape == (*shape, 2), f"window has shape {window.shape}; it must be {(*shape, 2)} or (2,)")
    elif window is not None:
        check_window(config, window)
    arrays = {name: as_array(name, value) for name, value in given.items() if value is not None}
    for name, array in arrays.items():
        kind, meaning = _KINDS.get(name, (jnp.floating, "floats"))
        require(jnp.issubdtype(array.dtype, kind), f"{name} is {array.dtype}; it must hold {meaning}")
        message = f"{name} has shape {array.shape}; it must be {shape}, one for every token of x_BTD"
        require(name == "bias_C" or array.shape == shape, message)
    return MoEContext(window=window, experts=experts, **arrays)


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype, which is given as a name or, as is usual in Flax, as `jnp.bfloat16`."""
    return dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))


def _of_tokens(window: Any) -> Window | None:
    """The window of all tokens, or their own windows flattened from [B, T, 2] to [B T, 2]."""
    of_tokens: Window | None = window.reshape(-1, 2) if getattr(window, "ndim", 1) == 3 else window
    return of_tokens


def _of_each_token(
    config: AnyExpertsConfig, bias_MC: Float[Array, "M C"], modality_N: Int[Array, "N"] | None
) -> Float[Array, "*N C"]:
    """The bias of the router that reads each token; text's for all while parameters are initialised."""
    require(bias_MC.shape == config.bias_shape, f"bias_C has shape {bias_MC.shape}; need {config.bias_shape}")
    own_N = router_of(config, modality_N)
    return bias_MC[0] if own_N is None else bias_MC[own_N]


class Experts(nn.Module):
    """The weights of E SwiGLU experts; the call returns them in the compute dtype."""

    num_experts: int
    d_ff: int
    residual_scale: float = 1.0
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, d_model: int) -> ExpertWeights:
        wide, narrow = (self.num_experts, d_model, self.d_ff), (self.num_experts, self.d_ff, d_model)
        wide_axes, narrow_axes = ("expert", "embed", "expert_mlp"), ("expert", "expert_mlp", "embed")
        widen = named(FanIn(num_batch=1), wide_axes)
        narrow_init = named(FanIn(num_batch=1, scale=self.residual_scale), narrow_axes)

        def weight(name: str, init: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
            own = self.param(name, init, shape, jnp.dtype(self.param_dtype))
            adapter = low_rank(self, self.lora, name, WeightAxes(shape, axes, num_batch=1))
            return adapted(own, adapter).astype(self.dtype)

        return ExpertWeights(
            gate_EDF=weight("w_gate_EDF", widen, wide, wide_axes),
            up_EDF=weight("w_up_EDF", widen, wide, wide_axes),
            down_EFD=weight("w_down_EFD", narrow_init, narrow, narrow_axes),
        )


class MoE(nn.Module):
    """One AnyExperts layer: a token's importance decides how many experts it gets (AnyExperts section 2).

    It can be used on its own: `MoE(config, d_ff=512).init(key, x_BTD)`. For `slot_rounding="stochastic"`, training
    passes the rng "routing" to `apply`; without it the slots are rounded half up. For diagnostics only: the rng
    "shuffle" shuffles every token's logits among the real experts, and a mutable collection "probe" records the logits
    before that, the combine weights and the output of the routed experts.

    Example:
        >>> import anyexperts_jax as ax, jax
        >>> layer = ax.MoE(ax.AnyExpertsConfig(num_experts=8, num_virtual=2, k_min=2, k_max=4), d_ff=16)
        >>> x_BTD = jax.random.normal(jax.random.key(0), (2, 16, 8))
        >>> (y_BTD, trace), variables = layer.init_with_output(jax.random.key(1), x_BTD)
        >>> y_BTD.shape, trace.expert_ids_BTK.shape
        ((2, 16, 8), (2, 16, 4))
    """

    config: AnyExpertsConfig
    d_ff: int  # F, width of one expert
    num_shared_experts: int = 0  # shared experts, each F wide, that every token uses
    execution: Execution = Execution()
    residual_scale: float = 1.0  # scale of the down projections' initial values
    norm_eps: float = 1e-6
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    placement: Placement | None = None  # the mesh that the arrays lie on; None: one device
    lora: LoraConfig | None = None  # adapters of the experts, including shared ones

    @nn.compact
    def __call__(
        self, x_BTD: Float[ArrayLike, "B T D"], context: MoEContext | None = None, **fields: Any
    ) -> tuple[Float[Array, "B T D"], RoutingTrace]:
        """Returns the layer's output, without a residual connection, and the trace of its routing.

        Args:
          x_BTD: normalised input.
          context: padding, modalities, window, expert bias. With `hsm_site="residual"` the caller modulates its
            residual stream and passes the importance logits.
          fields: fields of `MoEContext` that override the context's: `layer.apply(params, x_BTD, valid_BT=valid_BT)`.

        Raises:
          UserError: for shapes that do not fit, or a capacity that cannot hold every token's slots.
        """
        x_BTD = as_floats("x_BTD", x_BTD)
        self._check(x_BTD)
        context = _checked(self.config, context, fields, x_BTD.shape[:2])
        batch, length, d_model = x_BTD.shape
        importance_logits_BT = self._importance_logits(x_BTD, context)
        strength = self._strength()
        if self.config.switches.hsm_site == "block_input":
            importance_BT = importance(importance_logits_BT)
            x_BTD = modulate(x_BTD, importance_BT if strength is None else strength * importance_BT, self.config.alpha)
        x_ND = x_BTD.reshape(batch * length, d_model)
        plan = self._plan(x_ND, importance_logits_BT, context, strength)
        types = self.dtype, self.param_dtype, self.lora
        experts = Experts(self.config.num_experts, self.d_ff, self.residual_scale, *types, name="experts")
        weights = experts(d_model)
        if context.experts is None:
            y_ND, stats = apply_plan(x_ND, plan, weights, self.execution, self.placement)
        else:
            y_ND, stats = apply_in_place(x_ND, plan, context.experts, self.execution, self.placement)
        y_BTD = y_ND.reshape(x_BTD.shape)
        self._probe("output_BTD", y_BTD)
        if self.num_shared_experts:
            width = self.num_shared_experts * self.d_ff
            shared = SwiGLU(width, self.residual_scale, *types[:2], lora=self.lora, name="shared")
            y_BTD = y_BTD + shared(x_BTD)
        return y_BTD, RoutingTrace.from_plan(plan, batch, stats.dropped)

    def _check(self, x_BTD: Array) -> None:
        require(x_BTD.ndim == 3, f"x_BTD has shape {x_BTD.shape}; it must be [B, T, D]: add a batch axis, x[None]")
        require(self.d_ff >= 1, f"d_ff={self.d_ff} must be >= 1")
        for name in ("dtype", "param_dtype"):
            require_one_of(name, _dtype_name(getattr(self, name)), get_args(Dtype))
        require_capacity_for(self.config, self.execution)

    def _importance_logits(self, x_BTD: Array, context: MoEContext) -> Float[Array, "B T"]:
        logits_BT = context.importance_logits_BT
        if logits_BT is None and self.config.uses_importance:
            logits_BT = ImportanceMLP(self.config.switches.importance_mlp, self.norm_eps, name="importance")(x_BTD)
        if logits_BT is None:
            logits_BT = jnp.zeros(x_BTD.shape[:2], jnp.float32)
        return checkpoint_name(logits_BT, ROUTER_LOGITS)

    def _strength(self) -> Float[Array, ""] | None:
        if self.config.switches.onset == "full":
            return None
        return self.param("strength", named(Constant(0.0), ()), (), jnp.float32)

    def _plan(
        self,
        x_ND: Array,
        importance_logits_BT: Array,
        context: MoEContext,
        strength: Float[Array, ""] | None,
    ) -> RoutingPlan:
        config, (batch, length) = self.config, importance_logits_BT.shape
        modality_N = None if context.modality_BT is None else jnp.asarray(context.modality_BT).reshape(-1)
        logits_NC = checkpoint_name(Router(config, name="router")(x_ND, modality_N), ROUTER_LOGITS)
        self._probe("logits_BTC", logits_NC.reshape(batch, -1, logits_NC.shape[1]))
        if self.has_rng("shuffle"):
            logits_NC = shuffled_logits(self.make_rng("shuffle"), logits_NC, config.num_experts)
        if strength is not None:
            logits_NC = faded_logits(config, logits_NC, importance(importance_logits_BT.reshape(-1)), strength)
            config = config.with_switches(iar="off")
        bias_C = context.bias_C
        if bias_C is None and config.expert_bias and self.is_initializing():
            bias_C = jnp.zeros(config.bias_shape, jnp.float32)
        if bias_C is not None and config.bias_by_modality:
            bias_C = _of_each_token(config, jnp.asarray(bias_C), modality_N)
        rounds_stochastically = config.switches.slot_rounding == "stochastic" and self.has_rng("routing")
        if config.switches.slot_rounding == "stochastic" and not rounds_stochastically:
            config = config.with_switches(slot_rounding="round")
        plan = route(
            config,
            logits_NC,
            importance_logits_BT.reshape(-1),
            None if context.valid_BT is None else context.valid_BT.reshape(-1),
            bias_C,
            window=_of_tokens(context.window),
            num_sequences=batch,
            batch_shards=1 if self.placement is None else batch_shards(self.placement.mesh, self.placement.rules),
            key=self.make_rng("routing") if rounds_stochastically else None,
            modality_N=modality_N,
        )
        self._probe("weights_BTK", plan.weights_NK.reshape(batch, length, -1))
        self._probe("virtual_weight_BT", plan.virtual_weight_N.reshape(batch, length))
        return plan

    def _probe(self, name: str, value: Array) -> None:
        if self.is_mutable_collection("probe") and not self.is_initializing():
            self.sow("probe", name, value, reduce_fn=lambda _, new: new)

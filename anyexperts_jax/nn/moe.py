"""The mixture-of-experts layer: parameters here, policy in `routing`, movement in `dispatch`, compute in `ops`."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.remat import ROUTER_LOGITS
from anyexperts_jax.dispatch.apply import moe_apply_stats
from anyexperts_jax.nn.config import Dtype, Residuals
from anyexperts_jax.nn.importance import ImportanceMLP
from anyexperts_jax.nn.mlp import SwiGLU
from anyexperts_jax.nn.params import FanIn, named
from anyexperts_jax.nn.router import Router
from anyexperts_jax.routing.importance import importance, modulate
from anyexperts_jax.routing.route import route
from anyexperts_jax.routing.routers.shuffle import shuffled_logits
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.sharding.activations import split_buffers
from anyexperts_jax.sharding.blocks import split_blocks
from anyexperts_jax.sharding.expert_parallel import Placement, moe_exchange_stats


class Experts(nn.Module):
    """The weights of E SwiGLU experts, in the compute dtype."""

    num_experts: int
    d_ff: int
    residual_scale: float = 1.0
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, d_model: int) -> tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]:
        wide, narrow = (self.num_experts, d_model, self.d_ff), (self.num_experts, self.d_ff, d_model)
        widen = named(FanIn(num_batch=1), ("expert", "embed", "expert_mlp"))
        narrow_init = named(FanIn(num_batch=1, scale=self.residual_scale), ("expert", "expert_mlp", "embed"))
        weights = (
            self.param("w_gate_EDF", widen, wide, jnp.dtype(self.param_dtype)),
            self.param("w_up_EDF", widen, wide, jnp.dtype(self.param_dtype)),
            self.param("w_down_EFD", narrow_init, narrow, jnp.dtype(self.param_dtype)),
        )
        gate, up, down = (w.astype(self.dtype) for w in weights)
        return gate, up, down


class MoE(nn.Module):
    """One AnyExperts layer: each token gets as many experts as its importance asks for (AnyExperts section 2).

    Usable on its own: `MoE(config, d_ff=512).init(key, x_BTD)`. `apply` takes the rng "routing" when
    `slot_rounding="stochastic"` in training; without it the slots are rounded half up. For diagnostics alone: with the
    rng "shuffle" every token's logits are dealt anew to the real experts, and a mutable collection "probe" gets them
    as they were, and what the routed experts put out.
    """

    config: AnyExpertsConfig
    d_ff: int  # F, of one expert
    num_shared_experts: int = 0  # each F wide, on every token
    dispatch: str = "blocks"  # see dispatch.moe_apply
    expert_mlp: str | None = None  # implementation of the expert op
    expert_residuals: Residuals = "saved"  # see dispatch.moe_apply
    exchange_chunks: int = 1  # see sharding.expert_parallel.moe_exchange_stats
    residual_scale: float = 1.0  # of the down projections' initial values
    norm_eps: float = 1e-6
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    placement: Placement | None = None  # of the arrays; None: one device

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        valid_BT: Bool[Array, "B T"] | None = None,
        bias_C: Float[Array, "C"] | None = None,
        window: Float[Array, "2"] | None = None,
        importance_logits_BT: Float[Array, "B T"] | None = None,
        modality_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RoutingTrace]:
        """Returns the layer's output, without a residual connection, and what the router did.

        Args:
          x_BTD: normalised input.
          valid_BT: False at padding, which gets no slots, output zero from the routed experts, and no say in losses.
          bias_C: the expert bias of loss-free balancing (added to the ranking only), needed iff `expert_bias`.
          window: (k_min, k_max) in place of the configuration's.
          importance_logits_BT: computed by the caller, as a block does that modulates its residual stream. With
            `hsm_site="residual"` modulation is the caller's business.
          modality_BT: ids in [0, router_modalities); needed by routers that tell modalities apart.

        Raises:
          UserError: unknown dispatch or implementation, or shapes that do not fit.
        """
        config = self.config
        batch, length, d_model = x_BTD.shape
        if importance_logits_BT is None and config.uses_importance:
            mlp = ImportanceMLP(config.importance_mlp, self.norm_eps, name="importance")
            importance_logits_BT = mlp(x_BTD)
        if importance_logits_BT is None:
            importance_logits_BT = jnp.zeros((batch, length), jnp.float32)
        importance_logits_BT = checkpoint_name(importance_logits_BT, ROUTER_LOGITS)
        if config.hsm_site == "block_input":
            x_BTD = modulate(x_BTD, importance(importance_logits_BT), config.alpha)
        x_ND = x_BTD.reshape(batch * length, d_model)
        modality_N = None if modality_BT is None else modality_BT.reshape(-1)
        logits_NC = checkpoint_name(Router(config, name="router")(x_ND, modality_N), ROUTER_LOGITS)
        if self.is_mutable_collection("probe") and not self.is_initializing():
            self.sow("probe", "logits_BTC", logits_NC.reshape(batch, length, -1), reduce_fn=lambda _, new: new)
        if self.has_rng("shuffle"):
            logits_NC = shuffled_logits(self.make_rng("shuffle"), logits_NC, config.num_experts)
        if bias_C is None and config.expert_bias and self.is_initializing():
            bias_C = jnp.zeros(config.num_columns, jnp.float32)
        key = self.make_rng("routing") if self._rounds_stochastically() else None
        plan = route(
            self._routing_config(),
            logits_NC,
            importance_logits_BT.reshape(-1),
            None if valid_BT is None else valid_BT.reshape(-1),
            bias_C,
            window=window,
            num_sequences=batch,
            key=key,
        )
        experts = Experts(
            config.num_experts, self.d_ff, self.residual_scale, self.dtype, self.param_dtype, name="experts"
        )
        how: dict[str, Any] = {"num_sequences": batch, "residuals": self.expert_residuals}
        if self.dispatch == "exchange" and self.placement is not None:
            how["chunks"] = self.exchange_chunks
            y_ND, stats = moe_exchange_stats(x_ND, plan, *experts(d_model), self.placement, self.expert_mlp, **how)
        else:
            how["place_buffers"] = functools.partial(split_buffers, placement=self.placement)
            how["run_blocks"] = functools.partial(split_blocks, placement=self.placement, num_sequences=batch)
            y_ND, stats = moe_apply_stats(x_ND, plan, *experts(d_model), self.dispatch, self.expert_mlp, **how)
        y_BTD = y_ND.reshape(x_BTD.shape)
        if self.is_mutable_collection("probe") and not self.is_initializing():
            self.sow("probe", "output_BTD", y_BTD, reduce_fn=lambda _, new: new)
        if self.num_shared_experts:
            width = self.num_shared_experts * self.d_ff
            y_BTD = y_BTD + SwiGLU(width, self.residual_scale, self.dtype, self.param_dtype, name="shared")(x_BTD)
        return y_BTD, RoutingTrace.from_plan(plan, batch, stats.dropped)

    def _rounds_stochastically(self) -> bool:
        return self.config.slot_rounding == "stochastic" and self.has_rng("routing")

    def _routing_config(self) -> AnyExpertsConfig:
        if self.config.slot_rounding != "stochastic" or self._rounds_stochastically():
            return self.config
        return dataclasses.replace(self.config, slot_rounding="round")

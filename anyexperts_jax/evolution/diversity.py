"""Diversity losses of stage III: EvoMoE's baselines "contrastive" and "local entropy".

The paper gives their names and scores but not their formulas; both are our reading.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.evolution.config import Diversity
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.paths import moe_probe
from anyexperts_jax.routing.losses import masked_mean
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.train.step import Apply

TEMPERATURE = 0.1


def diversity_apply(kind: Diversity, weight: float, config: ModelConfig, placement: Placement | None = None) -> Apply:
    """The model whose trace has an additional loss "diversity": `weight` times the loss `kind` of each layer."""
    model = MultimodalModel(config, placement)

    def apply(
        params: Any, batch: Batch, router_bias_LC: Array, key: Array | None, window: Array | None
    ) -> tuple[Array, RoutingTrace]:
        rngs = None if key is None else {"routing": key}
        options: dict[str, Any] = {"router_bias_LC": router_bias_LC, "window": window, "mutable": ["probe"]}
        output, probed = model.apply({"params": params}, batch, rngs=rngs, **options)
        seen, trace = moe_probe(probed), output.trace
        valid_BT = jnp.asarray(batch.valid_BT)
        if kind == "local_entropy":
            loss_L = jax.vmap(local_entropy, (0, None))(seen["logits_BTC"], valid_BT)
        else:
            each_layer = jax.vmap(lambda y, ids: contrast(y, ids, valid_BT, config.moe.num_experts))
            loss_L = each_layer(seen["output_BTD"], trace.expert_ids_BTK[..., 0])
        losses = {**trace.losses, "diversity": weight * loss_L}
        return output.logits_BTY, dataclasses.replace(trace, losses=losses)

    return apply


def local_entropy(logits_BTC: Float[Array, "B T C"], valid_BT: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The mean routing entropy of valid tokens, in nats: rewards confident routing (as in LIMoE, arXiv 2206.02770)."""
    log_BTC = jax.nn.log_softmax(logits_BTC.astype(jnp.float32))
    entropy_BT = -(jnp.exp(log_BTC) * log_BTC).sum(-1)
    return masked_mean(entropy_BT.ravel(), valid_BT.ravel())


def contrast(
    output_BTD: Float[Array, "B T D"], expert_BT: Int[Array, "B T"], valid_BT: Bool[Array, "B T"], num_experts: int
) -> Float[Array, ""]:
    """The contrastive loss: cross entropy, in nats, of a token's expert over its output's cosines to the experts'
    means.

    It pulls an output towards its own expert's mean output and away from the others'. Experts without tokens do not
    count.
    """
    y_ND = output_BTD.astype(jnp.float32).reshape(-1, output_BTD.shape[-1])
    y_ND = y_ND / jnp.sqrt((y_ND**2).sum(-1, keepdims=True) + 1e-12)
    valid_N = valid_BT.ravel()
    is_of_NE = (expert_BT.reshape(-1, 1) == jnp.arange(num_experts)[None]) & valid_N[:, None]
    mean_ED = jnp.einsum("ne,nd->ed", is_of_NE.astype(jnp.float32), y_ND, precision=jax.lax.Precision.HIGHEST)
    mean_ED = mean_ED / jnp.sqrt((mean_ED**2).sum(-1, keepdims=True) + 1e-12)
    cosine_NE = jnp.einsum("nd,ed->ne", y_ND, mean_ED, precision=jax.lax.Precision.HIGHEST)
    log_NE = jax.nn.log_softmax(jnp.where(is_of_NE.any(0)[None], cosine_NE / TEMPERATURE, -1e9))
    return masked_mean(-jnp.where(is_of_NE, log_NE, 0).sum(-1), is_of_NE.any(-1))

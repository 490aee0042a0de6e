"""Qwen3 and Qwen3-MoE, which normalise queries and keys within each head."""

from typing import Any

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import comma_list, require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.nn.config import AttentionConfig
from anyexperts_jax.pretrained.decoders import (
    around_rules,
    attention_config,
    attention_rules,
    decoder_config,
    dense_mlp_rules,
    expert_rules,
    norm_rules,
)
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import ExpertLayout, Rule


def _attention(hub: HubConfig) -> AttentionConfig:
    bias = hub.flag("attention_bias", False)
    return attention_config(hub, qk_norm=True, qkv_bias=bias, out_bias=bias)


def _dense_config(hub: HubConfig) -> ModelConfig:
    return decoder_config(hub, _attention(hub), eps=1e-6, d_ff=hub.whole("intermediate_size"))


def moe_config(hub: HubConfig, **policy: Any) -> ModelConfig:
    """Reads Qwen3-MoE's decoder.

    Args:
      policy: further fields of AnyExpertsConfig.
    """
    renormalised = hub.flag("norm_topk_prob", False)  # the class's default; the releases set it to true
    moe = AnyExpertsConfig.static_top_k(
        hub.num_experts(),
        hub.whole("num_experts_per_tok"),
        **{"normalisation": "all" if renormalised else "none", **policy},
    )
    first, every = layer_pattern(hub)
    return decoder_config(
        hub,
        _attention(hub),
        eps=1e-6,
        moe=moe,
        num_dense_layers=first,
        moe_every=every,
        d_ff=hub.whole("intermediate_size", 1),
        expert_d_ff=hub.whole("moe_intermediate_size"),
    )


def layer_pattern(hub: HubConfig) -> tuple[int, int]:
    """Returns (n, m): n leading dense layers, then every m-th layer has experts.

    In config.json, layer i has experts if decoder_sparse_step divides i + 1 and i is not in mlp_only_layers.

    Raises:
      UserError: if no such pair describes the layers with experts.
    """
    layers, step = hub.whole("num_hidden_layers"), hub.whole("decoder_sparse_step", 1)
    dense = hub.get("mlp_only_layers", [])
    require(isinstance(dense, list), f"{hub.where}: mlp_only_layers must be a list")
    require(step >= 1, f"{hub.where}: decoder_sparse_step={step} must be >= 1")
    sparse = [i for i in range(layers) if (i + 1) % step == 0 and i not in dense]
    require(bool(sparse), f"{hub.where}: no layer has experts; name the dense class in architectures")
    every = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    first = sparse[0] - every + 1
    regular = first >= 0 and sparse == list(range(sparse[0], layers, every)) and sparse[-1] == layers - 1
    require(
        regular,
        f"{hub.where}: layers {comma_list(sparse)} of {layers} have experts; only leading dense layers and then every "
        "n-th layer up to the last are supported",
    )
    return first, every


def qwen3_rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    """Rules for the dense and the MoE model."""
    own = (*around_rules(config), *norm_rules(), *attention_rules(config), *dense_mlp_rules(config))
    return (*own, *expert_rules(layout)) if config.stack.num_moe_layers else own


QWEN3 = Family(("Qwen3ForCausalLM",), _dense_config, qwen3_rules)
QWEN3_MOE = Family(("Qwen3MoeForCausalLM",), moe_config, qwen3_rules)

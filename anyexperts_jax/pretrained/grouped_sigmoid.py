"""The router and shared experts of DeepSeek-V3, which GLM-4-MoE and Ling 2.0 share.

Scores are sigmoids. Experts are chosen by score plus bias, among the best groups, and weighted by score alone.
"""

import re
from typing import Any

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.nn.config import AttentionConfig
from anyexperts_jax.pretrained.decoders import LAYER, ONE_GATE, Gate, decoder_config, dense_mlp_rules, expert_rules
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import KERNEL, ROUTER_BIAS, ExpertLayout, Rule


def grouped_config(hub: HubConfig, attention: AttentionConfig, *, eps: float, **policy: Any) -> ModelConfig:
    """Reads a decoder whose first `first_k_dense_replace` layers are dense.

    Args:
      policy: fields of AnyExpertsConfig that replace those read from config.json.
    """
    renormalised = hub.flag("norm_topk_prob", True)
    moe = AnyExpertsConfig.static_top_k(
        hub.num_experts(),
        hub.whole("num_experts_per_tok"),
        **{
            "scores": "sigmoid",
            "selection": "scores",
            "expert_bias": True,
            "num_groups": hub.whole("n_group", 1),
            "groups_kept": hub.whole("topk_group", 1),
            "scaling_factor": hub.number("routed_scaling_factor", 1.0),
            "normalisation": "all" if renormalised else "none",
            **policy,
        },
    )
    shared = hub.get("n_shared_experts", hub.get("num_shared_experts", 0))
    return decoder_config(
        hub,
        attention,
        eps=eps,
        moe=moe,
        num_dense_layers=min(hub.whole("first_k_dense_replace", 0), hub.whole("num_hidden_layers")),
        num_shared_experts=int(shared),
        d_ff=hub.whole("intermediate_size"),
        expert_d_ff=hub.whole("moe_intermediate_size"),
    )


def grouped_mlp_rules(
    config: ModelConfig, layout: ExpertLayout, bias: str, gates: tuple[Gate, ...] = ONE_GATE
) -> tuple[Rule, ...]:
    """Rules for the dense FFNs, experts, routers and shared experts; `bias` is the name of a router's bias."""
    rules = [*dense_mlp_rules(config), *expert_rules(layout, gates=gates)]
    if config.moe.expert_bias:
        rules += [Rule(ROUTER_BIAS, f"{LAYER}mlp.{gate}.{bias}", layers="moe", place=place) for _, gate, place in gates]
    if config.stack.num_shared_experts:
        rules += [
            Rule(f"{{layer}}/moe/shared/{name}/kernel", f"{LAYER}mlp.shared_experts.{name}_proj.weight", KERNEL, "moe")
            for name in ("gate", "up", "down")
        ]
    return tuple(rules)


def further_heads(hub: HubConfig) -> tuple[str, ...]:
    """Returns patterns for the layers past the last: they predict further tokens and are not read."""
    first, count = hub.whole("num_hidden_layers"), hub.get("num_nextn_predict_layers", 0)
    return tuple(re.escape(f"model.layers.{first + i}.") + ".*" for i in range(int(count)))

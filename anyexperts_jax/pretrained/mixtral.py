"""Mixtral: every layer is an MoE layer with renormalised weights; gate, up and down are named w1, w3 and w2."""

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.decoders import (
    around_rules,
    attention_config,
    attention_rules,
    decoder_config,
    expert_rules,
    norm_rules,
)
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import ExpertLayout, Rule


def _config(hub: HubConfig) -> ModelConfig:
    moe = AnyExpertsConfig.static_top_k(hub.num_experts(), hub.whole("num_experts_per_tok", 2))
    width = hub.whole("intermediate_size")  # an expert's width, since no layer is dense
    return decoder_config(
        hub, attention_config(hub), eps=1e-5, moe=moe, slides=True, num_dense_layers=0, expert_d_ff=width
    )


def _rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    experts = expert_rules(layout) if layout != "each" else expert_rules(layout, "block_sparse_moe", ("w1", "w3", "w2"))
    return (*around_rules(config), *norm_rules(), *attention_rules(config), *experts)


MIXTRAL = Family(("MixtralForCausalLM",), _config, _rules)

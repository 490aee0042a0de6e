"""OLMoE: query and key norms over all heads at once, clipped projections, and weights that are not renormalised."""

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
    bias, clip = hub.flag("attention_bias", False), hub.get("clip_qkv")
    attention = attention_config(
        hub,
        qk_norm=True,
        qk_norm_over="width",
        qkv_bias=bias,
        out_bias=bias,
        clip_qkv=None if clip is None else hub.number("clip_qkv"),
    )
    moe = AnyExpertsConfig.static_top_k(
        hub.num_experts(),
        hub.whole("num_experts_per_tok", 8),
        normalisation="all" if hub.flag("norm_topk_prob", False) else "none",
    )
    width = hub.whole("intermediate_size")  # an expert's width, since no layer is dense
    return decoder_config(hub, attention, eps=1e-5, moe=moe, num_dense_layers=0, expert_d_ff=width)


def _rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    return (*around_rules(config), *norm_rules(), *attention_rules(config), *expert_rules(layout))


OLMOE = Family(("OlmoeForCausalLM",), _config, _rules)

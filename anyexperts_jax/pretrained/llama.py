"""Llama, and models of the same architecture such as SmolLM2."""

from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.decoders import (
    around_rules,
    attention_config,
    attention_rules,
    decoder_config,
    dense_mlp_rules,
    norm_rules,
)
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import ExpertLayout, Rule


def _config(hub: HubConfig) -> ModelConfig:
    hub.only("pretraining_tp", 1)
    bias = hub.flag("attention_bias", False)
    attention = attention_config(hub, qkv_bias=bias, out_bias=bias)
    return decoder_config(
        hub, attention, eps=1e-6, d_ff=hub.whole("intermediate_size"), mlp_bias=hub.flag("mlp_bias", False)
    )


def _rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    del layout  # no experts
    return (*around_rules(config), *norm_rules(), *attention_rules(config), *dense_mlp_rules(config))


def _ignored(_: HubConfig) -> tuple[str, ...]:
    return (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # in old files; computed from rope_theta


LLAMA = Family(("LlamaForCausalLM",), _config, _rules, _ignored)

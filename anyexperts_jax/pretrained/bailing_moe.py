"""Ling 2.0 (`BailingMoeV2ForCausalLM`), and Sarvam, which has its tensors' names and its router.

`model_type` is "bailing_moe" or "bailing_moe_v2", as older models of other shapes say too: the class tells them apart.
"""

from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.decoders import LAYER, around_rules, attention_config, norm_rules
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.grouped_sigmoid import further_heads, grouped_config, grouped_mlp_rules
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import FLAT, KERNEL, KERNEL_OF_HEADS, ExpertLayout, Rule

_THREE = ("query", "key", "value")


def _config(hub: HubConfig) -> ModelConfig:
    hub.only("score_function", "sigmoid")
    hub.only("use_bias", False)
    width, shared = hub.get("moe_shared_expert_intermediate_size"), hub.whole("moe_intermediate_size")
    require(
        width is None or width % shared == 0,
        f"{hub.where}: moe_shared_expert_intermediate_size={width} is no multiple of moe_intermediate_size={shared}",
    )
    bias = hub.flag("use_qkv_bias", hub.flag("attention_bias", False))
    attention = attention_config(hub, qk_norm=hub.flag("use_qk_norm", True), qkv_bias=bias)
    return grouped_config(hub, attention, eps=1e-6, expert_bias=hub.flag("moe_router_enable_expert_bias", True))


def _rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    ours, theirs = "{layer}/self_attention/attention/", f"{LAYER}attention."
    rules = [Rule(f"{ours}out/kernel", f"{theirs}dense.weight", KERNEL_OF_HEADS)]
    for place, name in enumerate(_THREE):
        rules.append(Rule(f"{ours}{name}/kernel", f"{theirs}query_key_value.weight", KERNEL, part=(0, place)))
        if config.stack.attention.qkv_bias:
            rules.append(Rule(f"{ours}{name}/bias", f"{theirs}query_key_value.bias", FLAT, part=(0, place)))
    if config.stack.attention.qk_norm:
        rules += [Rule(f"{ours}{name}_norm/scale", f"{theirs}{name}_layernorm.weight") for name in _THREE[:2]]
    mlp = grouped_mlp_rules(config, layout, "expert_bias")
    return (*around_rules(config, "model.word_embeddings.weight"), *norm_rules(), *rules, *mlp)


BAILING_MOE = Family(("BailingMoeV2ForCausalLM", "Glm4MoeForCausalLM"), _config, _rules, further_heads, ("sarvam_moe",))

"""Ling 2.0 (`BailingMoeV2ForCausalLM`), and Sarvam, which has the same tensor names and router.

`model_type` is "bailing_moe" or "bailing_moe_v2". Older models with another architecture use the same types, so the
class decides.

The language model of Ming-flash-omni has the same class. Its `router_type` is "MultiRouter": three routers over one
pool of experts, each with its own kernel and bias, for text, for pictures and videos, and for sound. Here this is the
router "per_modality" with `router_of_modality`. Only text is read, for which its spatial rotary embedding
("video_rope") equals the usual one.
"""

from collections.abc import Mapping
from typing import Any

from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.decoders import LAYER, ONE_GATE, around_rules, attention_config, norm_rules
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.grouped_sigmoid import further_heads, grouped_config, grouped_mlp_rules
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import FLAT, KERNEL, KERNEL_OF_HEADS, ExpertLayout, Rule

_THREE = ("query", "key", "value")
_GATES = ("gate", "image_gate", "audio_gate")  # Ming's routers, in the order in which they are stacked here
_BY_MODALITY = {"router": "per_modality", "router_modalities": len(_GATES), "router_of_modality": (0, 1, 2, 1)}
_SCALE = 2.5  # routed_scaling_factor's default in Ming's class
_IN_SPACE = ("video_rope", "3D", "default")


def _config(hub: HubConfig) -> ModelConfig:
    hub.only("score_function", "sigmoid")
    hub.only("router_type", "topN", "MultiRouter")
    several = hub.get("router_type") == "MultiRouter"
    hub = _text_alone(hub) if several else hub
    hub.only("use_bias", False)
    width, shared = hub.get("moe_shared_expert_intermediate_size"), hub.whole("moe_intermediate_size")
    require(
        width is None or width % shared == 0,
        f"{hub.where}: moe_shared_expert_intermediate_size={width} is no multiple of moe_intermediate_size={shared}",
    )
    bias = hub.flag("use_qkv_bias", hub.flag("attention_bias", False))
    attention = attention_config(hub, qk_norm=hub.flag("use_qk_norm", True), qkv_bias=bias)
    biased = hub.flag("moe_router_enable_expert_bias", True)
    policy = {**_BY_MODALITY, "bias_by_modality": biased} if several else {}
    return grouped_config(hub, attention, eps=1e-6, expert_bias=biased, **policy)


def _text_alone(hub: HubConfig) -> HubConfig:
    """Rewrites Ming's configuration for text, where a token's three rotary positions are the same."""
    values: dict[str, Any] = dict(hub.values)
    for home in ("rope_scaling", "rope_parameters"):
        own = values.get(home)
        if isinstance(own, Mapping) and own.get("rope_type", own.get("type", "default")) in _IN_SPACE:
            values[home] = {k: v for k, v in own.items() if k not in ("type", "rope_type", "mrope_section")}
    scale, other = values.get("routed_scaling_factor"), values.get("moe_router_topk_scaling_factor")
    message = f"{hub.where}: routed_scaling_factor={scale}, moe_router_topk_scaling_factor={other} disagree"
    require(scale is None or other is None or scale == other, message)
    values["routed_scaling_factor"] = next((one for one in (scale, other) if one is not None), _SCALE)
    return HubConfig(values, hub.where)


def _rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    ours, theirs = "{layer}/self_attention/attention/", f"{LAYER}attention."
    rules = [Rule(f"{ours}out/kernel", f"{theirs}dense.weight", KERNEL_OF_HEADS)]
    for place, name in enumerate(_THREE):
        rules.append(Rule(f"{ours}{name}/kernel", f"{theirs}query_key_value.weight", KERNEL, part=(0, place)))
        if config.stack.attention.qkv_bias:
            rules.append(Rule(f"{ours}{name}/bias", f"{theirs}query_key_value.bias", FLAT, part=(0, place)))
    several = config.moe.router == _BY_MODALITY["router"]
    if config.stack.attention.qk_norm:
        for name in _THREE[:2]:
            norm = f"{name[0]}_norm" if several else f"{name}_layernorm"
            rules.append(Rule(f"{ours}{name}_norm/scale", f"{theirs}{norm}.weight"))
    gates = tuple(("kernel_MDC", gate, (place,)) for place, gate in enumerate(_GATES)) if several else ONE_GATE
    mlp = grouped_mlp_rules(config, layout, "expert_bias", gates)
    return (*around_rules(config, "model.word_embeddings.weight"), *norm_rules(), *rules, *mlp)


BAILING_MOE = Family(("BailingMoeV2ForCausalLM", "Glm4MoeForCausalLM"), _config, _rules, further_heads, ("sarvam_moe",))

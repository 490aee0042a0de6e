"""DeepSeek-V3 and other models of its class (`DeepseekV3ForCausalLM`: R1, Kimi-K2, Moonlight), with latent attention.

The releases with 671B parameters are quantised to 8-bit blocks; see `fp8_blocks`.
"""

import dataclasses
from typing import Any

from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.nn.config import AttentionConfig, LatentConfig
from anyexperts_jax.pretrained.decoders import LAYER, around_rules, norm_rules
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.grouped_sigmoid import further_heads, grouped_config, grouped_mlp_rules
from anyexperts_jax.pretrained.hub_config import HubConfig, yarn_growth
from anyexperts_jax.pretrained.rules import KERNEL, KERNEL_OF_HEADS, ExpertLayout, Rule

# The defaults of the class, for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_interleave": True,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
}
_LATENT_EPS = 1e-6  # epsilon of the norms of the latents, independent of rms_norm_eps


def _with_defaults(hub: HubConfig) -> HubConfig:
    return dataclasses.replace(hub, values={**_DEFAULTS, **hub.values})


def latent_attention(hub: HubConfig) -> AttentionConfig:
    """Heads, latents and rotary positions.

    Raises:
      UserError: for what is not computed here.
    """
    heads = hub.whole("num_attention_heads")
    hub.only("num_key_value_heads", heads)
    plain_dim, rope_dim = hub.whole("qk_nope_head_dim"), hub.whole("qk_rope_head_dim")
    hub.only("head_dim", rope_dim)  # the class uses this key for the rotated part of a head
    rope = hub.rope(rope_dim)
    fraction = rope.pop("rope_fraction", 1.0)
    require(fraction == 1, f"{hub.where}: partial_rotary_factor={fraction:g} is not supported with latent attention")
    bias = hub.flag("attention_bias", False)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=plain_dim + rope_dim,
        **rope,
        qkv_bias=bias,
        out_bias=bias,
        latent=LatentConfig(
            kv_rank=hub.whole("kv_lora_rank"),
            query_rank=None if hub.get("q_lora_rank") is None else hub.whole("q_lora_rank"),
            plain_dim=plain_dim,
            rope_dim=rope_dim,
            value_dim=hub.whole("v_head_dim"),
            interleaved=hub.flag("rope_interleave", True),
            score_factor=_score_factor(hub),
            norm_eps=_LATENT_EPS,
        ),
    )


def _score_factor(hub: HubConfig) -> float:
    """Returns the factor of the attention scores: YaRN's growth at `mscale_all_dim`, squared; 1 without that key."""
    settings = hub.rope_settings()
    scale_all = settings.get("mscale_all_dim")
    if not scale_all or settings.get("rope_type", settings.get("type", "default")) == "default":
        return 1.0
    return yarn_growth(float(settings["factor"]), float(scale_all)) ** 2


def _config(hub: HubConfig) -> ModelConfig:
    hub = _with_defaults(hub)
    hub.only("scoring_func", "sigmoid")
    hub.only("topk_method", "noaux_tc")
    hub.only("moe_layer_freq", 1)
    return grouped_config(hub, latent_attention(hub), eps=1e-6)


def latent_rules(config: ModelConfig, theirs: str = f"{LAYER}self_attn.") -> list[Rule]:
    """The maps of attention and the norms of its latents.

    Args:
      theirs: the beginning of their names.
    """
    attention = config.stack.attention
    assert attention.latent is not None
    ours = "{layer}/self_attention/attention/"
    rules = [
        Rule(f"{ours}down/kernel", f"{theirs}kv_a_proj_with_mqa.weight", KERNEL),
        Rule(f"{ours}norm/scale", f"{theirs}kv_a_layernorm.weight"),
        Rule(f"{ours}up/kernel", f"{theirs}kv_b_proj.weight", KERNEL),
        Rule(f"{ours}out/kernel", f"{theirs}o_proj.weight", KERNEL_OF_HEADS),
    ]
    biased = {"down": "kv_a_proj_with_mqa", "out": "o_proj"}
    if attention.latent.query_rank is None:
        rules.append(Rule(f"{ours}query/kernel", f"{theirs}q_proj.weight", KERNEL))
    else:
        biased["query_down"] = "q_a_proj"
        rules += [
            Rule(f"{ours}query_down/kernel", f"{theirs}q_a_proj.weight", KERNEL),
            Rule(f"{ours}query_norm/scale", f"{theirs}q_a_layernorm.weight"),
            Rule(f"{ours}query_up/kernel", f"{theirs}q_b_proj.weight", KERNEL),
        ]
    if attention.qkv_bias:
        rules += [Rule(f"{ours}{name}/bias", f"{theirs}{own}.bias") for name, own in biased.items()]
    return rules


def _rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    mlp = grouped_mlp_rules(config, layout, "e_score_correction_bias")
    return (*around_rules(config), *norm_rules(), *latent_rules(config), *mlp)


def _ignored(hub: HubConfig) -> tuple[str, ...]:
    return further_heads(_with_defaults(hub))


DEEPSEEK_V3 = Family(("DeepseekV3ForCausalLM",), _config, _rules, _ignored)

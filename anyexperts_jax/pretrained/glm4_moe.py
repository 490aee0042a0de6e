"""GLM-4.5 and later MoE models (`glm4_moe`), which rotate half of each head."""

from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.decoders import around_rules, attention_config, attention_rules, norm_rules
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.grouped_sigmoid import further_heads, grouped_config, grouped_mlp_rules
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import ExpertLayout, Rule


def _config(hub: HubConfig) -> ModelConfig:
    attention = attention_config(
        hub,
        fraction=0.5,
        qk_norm=hub.flag("use_qk_norm", False),
        qkv_bias=hub.flag("attention_bias", False),
    )
    return grouped_config(hub, attention, eps=1e-5)


def _rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    mlp = grouped_mlp_rules(config, layout, "e_score_correction_bias")
    return (*around_rules(config), *norm_rules(), *attention_rules(config), *mlp)


GLM4_MOE = Family(("Glm4MoeForCausalLM",), _config, _rules, further_heads, ("glm4_moe",))

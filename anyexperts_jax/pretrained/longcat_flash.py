"""LongCat-Flash (arXiv 2509.01322): each layer has two latent attentions, two dense FFNs and an MoE block beside them.

Beside 512 real experts there are 256 zero experts, which return their input. The softmax is over all of them, and a
token's k are chosen by score plus bias. The weights are the scores times a factor, without normalisation, also on zero
experts. Nothing limits how many of the k are zero experts. One of its layers is two of ours: see `nn.shortcut`.
"""

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import comma_list, require
from anyexperts_jax.core.files import require_local
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.nn.config import AttentionConfig
from anyexperts_jax.pretrained.decoders import around_rules, decoder_config
from anyexperts_jax.pretrained.deepseek_v3 import latent_attention, latent_rules
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import KERNEL, ROUTER_BIAS, ExpertLayout, Rule
from anyexperts_jax.pretrained.sources import Reader, SafetensorsFolder
from anyexperts_jax.pretrained.zeda import uncapped

CLASS = "LongcatFlashForCausalLM"
_GROUP = "model.layers.{g}."  # one of LongCat's layers: a group of two of ours
_DEFAULTS: dict[str, Any] = {  # what the class has where config.json does not say
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_topk": 12,
    "zero_expert_num": 256,
    "routed_scaling_factor": 6.0,
    "ffn_hidden_size": 12288,
    "expert_ffn_hidden_size": 2048,
}
_UNUSED = ("gate_proj", "up_proj")  # of a zero expert
_NAMES = {"w_gate_EDF": "gate_proj", "w_up_EDF": "up_proj", "w_down_EFD": "down_proj"}


class Mixture(NamedTuple):
    """The MoE block of one layer, run by `MoE(config, d_ff).apply({"params": params}, x_BTD, bias_C=bias_C)`."""

    config: AnyExpertsConfig
    d_ff: int
    params: dict[str, dict[str, Array]]
    bias_C: Float[Array, "C"]


def mixture_config(hub: HubConfig) -> AnyExpertsConfig:
    """Reads the routing policy of a LongCat-Flash.

    Raises:
      UserError: for a router with biases on its logits, or zero experts that do not return their input.
    """
    hub.only("zero_expert_type", "identity")
    hub.only("router_bias", False)
    hub.only("hidden_act", "silu")
    experts, zero = hub.num_experts(), hub.whole("zero_expert_num")
    return AnyExpertsConfig.static_top_k(
        experts,
        hub.whole("moe_topk"),
        scores="softmax",
        selection="scores",
        expert_bias=True,
        normalisation="none",
        scaling_factor=hub.number("routed_scaling_factor"),
        virtual_output="identity",
        **(uncapped(experts, zero) if zero else {}),
    )


def load_mixture(path: str | pathlib.Path, layer: int) -> Mixture:
    """Reads the router and the experts of one layer in float32.

    Some files have gate and up matrices of zero experts; they are never used and not read.

    Raises:
      UserError: if the folder has another class, or the layer's tensors do not fit config.json.
    """
    folder = require_local(path, "checkpoint")
    hub = HubConfig.read(folder)
    classes = hub.get("architectures")
    require(classes == [CLASS], f"{hub.where}: architectures={classes} must be [{CLASS}]")
    layers = hub.whole("num_layers")
    require(0 <= layer < layers, f"{hub.where}: layer {layer} is not among its {layers}")
    moe, prefix = mixture_config(hub), f"model.layers.{layer}.mlp."
    source = SafetensorsFolder.find(folder)
    width, d_ff = hub.whole("hidden_size"), hub.whole("expert_ffn_hidden_size")
    wanted = {
        f"{prefix}router.classifier.weight": (moe.num_columns, width),
        f"{prefix}router.e_score_correction_bias": (moe.num_columns,),
    }
    for expert in range(moe.num_experts):
        for ours, theirs in _NAMES.items():
            shape = (width, d_ff) if ours == "w_down_EFD" else (d_ff, width)
            wanted[f"{prefix}experts.{expert}.{theirs}.weight"] = shape
    found = {name: source.tensors[name].shape for name in source.tensors if name.startswith(prefix)}
    zero = range(moe.num_experts, moe.num_columns)
    unused = {f"{prefix}experts.{expert}.{name}.weight" for expert in zero for name in _UNUSED}
    wrong = sorted({*wanted.items()} ^ {(name, shape) for name, shape in found.items() if name not in unused})
    said = comma_list(name for name, _ in wrong[:4])
    require(not wrong, f"{source.where}: the tensors do not fit config.json: {said}")
    with source.opened() as reader:
        router = {"kernel": jnp.asarray(_read(reader, f"{prefix}router.classifier.weight").T)}
        bias_C = jnp.asarray(_read(reader, f"{prefix}router.e_score_correction_bias"))
        experts = {
            ours: jnp.stack([_read(reader, f"{prefix}experts.{e}.{theirs}.weight").T for e in range(moe.num_experts)])
            for ours, theirs in _NAMES.items()
        }
    return Mixture(moe, d_ff, {"router": router, "experts": experts}, bias_C)


def _read(reader: Reader, name: str) -> np.ndarray:
    return reader.read(name).astype(np.float32)


def _config(hub: HubConfig) -> ModelConfig:
    hub = dataclasses.replace(hub, values={**_DEFAULTS, **hub.values})
    layers = hub.whole("num_layers")
    hub.only("num_hidden_layers", layers, 2 * layers)
    for key in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        hub.only(key, True)
    hub = dataclasses.replace(hub, values={**hub.values, "num_hidden_layers": 2 * layers})
    return decoder_config(
        hub,
        _attention(hub),
        eps=1e-5,
        moe=mixture_config(hub),
        num_dense_layers=0,
        moe_every=2,
        shortcut=True,
        d_ff=hub.whole("ffn_hidden_size"),
        expert_d_ff=hub.whole("expert_ffn_hidden_size"),
    )


def _attention(hub: HubConfig) -> AttentionConfig:
    """DeepSeek-V3's, with queries and latents multiplied by the root of the width over their rank."""
    own = latent_attention(hub)
    assert own.latent is not None
    hub.only("qk_head_dim", own.head_dim)
    require(own.latent.query_rank is not None, f"{hub.where}: q_lora_rank=null is not supported")
    width, latent = hub.whole("hidden_size"), own.latent
    assert latent.query_rank is not None
    scaled = dataclasses.replace(
        latent,
        score_factor=latent.score_factor * math.sqrt(width / latent.query_rank),
        latent_factor=math.sqrt(width / latent.kv_rank),
    )
    return dataclasses.replace(own, latent=scaled)


def _rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    require(
        layout == "each", "LongCat-Flash's experts in one tensor are not read; save the model with a tensor for each"
    )
    dense = latent_rules(config, f"{_GROUP}self_attn.{{j}}.")
    dense += [
        Rule("{layer}/self_attention/norm/scale", f"{_GROUP}input_layernorm.{{j}}.weight"),
        Rule("{layer}/norm/scale", f"{_GROUP}post_attention_layernorm.{{j}}.weight"),
    ]
    dense += [
        Rule(f"{{layer}}/mlp/{name}/kernel", f"{_GROUP}mlps.{{j}}.{name}_proj.weight", KERNEL)
        for name in ("gate", "up", "down")
    ]
    second = [
        dataclasses.replace(rule, ours=rule.ours.replace("{layer}/", "{layer}/after/"), layers="moe") for rule in dense
    ]
    mixture = [
        Rule("{layer}/moe/router/kernel", f"{_GROUP}mlp.router.classifier.weight", KERNEL, "moe"),
        Rule(ROUTER_BIAS, f"{_GROUP}mlp.router.e_score_correction_bias", layers="moe"),
        *(
            Rule(f"{{layer}}/moe/experts/{ours}", f"{_GROUP}mlp.experts.{{e}}.{theirs}.weight", KERNEL, "moe")
            for ours, theirs in _NAMES.items()
        ),
    ]
    first = [dataclasses.replace(rule, layers="dense") for rule in dense]
    return (*around_rules(config), *first, *second, *mixture)


def _ignored(hub: HubConfig) -> tuple[str, ...]:
    """Heads that predict further tokens, and the matrices of the zero experts, which are in some files."""
    experts = hub.num_experts()
    zero = "|".join(str(experts + i) for i in range(hub.whole("zero_expert_num", _DEFAULTS["zero_expert_num"])))
    unused = [rf"model\.layers\.\d+\.mlp\.experts\.({zero})\.({'|'.join(_UNUSED)})\.weight"] if zero else []
    return (r"model\.mtp\..*", *unused)


LONGCAT_FLASH = Family((CLASS,), _config, _rules, _ignored)

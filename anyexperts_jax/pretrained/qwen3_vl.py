"""Qwen3-VL and Qwen3-VL-MoE: a vision tower in front of Qwen3's decoder, with positions of time, row and column.

The experts of a layer are published as two tensors, inputs by outputs. The weights of the chosen experts are always
renormalised.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require, shown
from anyexperts_jax.models.config import ModelConfig, VisionTowerConfig
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
from anyexperts_jax.pretrained.hub_config import HubConfig, keys
from anyexperts_jax.pretrained.qwen3 import layer_pattern
from anyexperts_jax.pretrained.rules import FLAT, KERNEL, KERNEL_OF_HEADS, ExpertLayout, Layout, Rule

MROPE_SECTION = (24, 20, 20)  # mrope_section's default in the classes
MOE_KEYS = keys(
    """
    num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step
    mlp_only_layers
    """
)
TEXT_KEYS = keys(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act max_position_embeddings rms_norm_eps rope_parameters rope_scaling rope_theta attention_bias
    tie_word_embeddings sliding_window use_sliding_window
    """
)
_TOP = keys(
    """
    text_config vision_config tie_word_embeddings image_token_id video_token_id vision_start_token_id
    vision_end_token_id
    """
)
VISION_KEYS = keys(
    """
    depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size spatial_merge_size
    temporal_patch_size out_hidden_size num_position_embeddings deepstack_visual_indexes rope_parameters
    """
)
_ROPE = keys(
    """
    rope_theta rope_type type mrope_section mrope_interleaved interleaved factor original_max_position_embeddings
    low_freq_factor high_freq_factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim
    """
)


class MergerNames(NamedTuple):
    """The names of a merger's tensors."""

    deep: str  # the list of mergers that follow inner blocks
    norm: str
    up: str
    down: str


MERGERS = MergerNames("deepstack_merger_list", "norm", "linear_fc1", "linear_fc2")


def _dense_config(hub: HubConfig) -> ModelConfig:
    text = _text(hub, TEXT_KEYS)
    text.whole("head_dim")  # the class's default is not the width over the heads
    return _whole(hub, decoder_config(text, _attention(text), eps=1e-6, d_ff=text.whole("intermediate_size")))


def _moe_config(hub: HubConfig) -> ModelConfig:
    text = _text(hub, TEXT_KEYS | MOE_KEYS)
    text.only("norm_topk_prob", True)
    return _whole(hub, moe_decoder(text, renormalised=True))


def moe_decoder(text: HubConfig, renormalised: bool) -> ModelConfig:
    """Reads the MoE decoder of a `text_config`.

    Args:
      renormalised: whether the weights of the chosen experts sum to one.

    Raises:
      UserError: for values that are not supported.
    """
    first, every = layer_pattern(text)
    normalisation: Literal["all", "none"] = "all" if renormalised else "none"
    return decoder_config(
        text,
        _attention(text),
        eps=1e-6,
        moe=AnyExpertsConfig.static_top_k(
            text.num_experts(), text.whole("num_experts_per_tok"), normalisation=normalisation
        ),
        num_dense_layers=first,
        moe_every=every,
        d_ff=text.whole("intermediate_size", 1),
        expert_d_ff=text.whole("moe_intermediate_size"),
    )


def _text(hub: HubConfig, known: frozenset[str]) -> HubConfig:
    hub.require_known(_TOP)
    return text_part(hub, known)


def text_part(hub: HubConfig, known: frozenset[str]) -> HubConfig:
    """Returns the `text_config`, after checking that its keys and those of its rope settings are known.

    Raises:
      UserError: naming the unknown keys.
    """
    text = hub.part("text_config")
    text.require_known(known)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(key), Mapping):
            rope = text.part(key)
            rope.require_known(_ROPE)
            rope.only("mrope_interleaved", True)
            rope.only("interleaved", True)
    return text


def _attention(text: HubConfig) -> AttentionConfig:
    given = {**text.get("rope_scaling", {}), **text.get("rope_parameters", {})}.get("mrope_section")
    section = MROPE_SECTION if given is None else given
    fits = isinstance(section, list | tuple) and len(section) == 3 and all(type(own) is int for own in section)
    require(fits, f"{text.where}: mrope_section={shown(section)} must be three whole numbers")
    bias = text.flag("attention_bias", False)
    return attention_config(text, qk_norm=True, qkv_bias=bias, out_bias=bias, mrope_section=tuple(section))


def _whole(hub: HubConfig, decoder: ModelConfig) -> ModelConfig:
    vision = hub.part("vision_config")
    vision.require_known(VISION_KEYS)
    tower = tower_config(vision, decoder.stack.d_model)
    return dataclasses.replace(decoder, tie_embeddings=hub.flag("tie_word_embeddings", False), vision_tower=tower)


def tower_config(vision: HubConfig, out_width: int) -> VisionTowerConfig:
    """Reads the tower of a `vision_config`.

    Args:
      out_width: the decoder's width, which the tower's rows must have.

    Raises:
      UserError: for values that are not supported.
    """
    vision.only("hidden_act", "gelu_pytorch_tanh")
    rope = HubConfig(vision.get("rope_parameters", {}), f"{vision.where}: rope_parameters")
    rope.require_known(("rope_theta", "rope_type"))
    rope.only("rope_type", "axial")
    places, deep = vision.whole("num_position_embeddings"), vision.get("deepstack_visual_indexes")
    side = math.isqrt(max(places, 0))
    require(side**2 == places, f"{vision.where}: num_position_embeddings={places} is no square of a whole number")
    numbers = isinstance(deep, list | tuple) and all(type(layer) is int for layer in deep)
    require(numbers, f"{vision.where}: deepstack_visual_indexes={shown(deep)} must be a list of layers")
    width = vision.whole("out_hidden_size")
    require(width == out_width, f"{vision.where}: out_hidden_size={width} is not the decoder's hidden_size={out_width}")
    return VisionTowerConfig(
        patch_size=vision.whole("patch_size"),
        temporal_patch_size=vision.whole("temporal_patch_size"),
        channels=vision.whole("in_channels"),
        merge=vision.whole("spatial_merge_size"),
        d_model=vision.whole("hidden_size"),
        num_layers=vision.whole("depth"),
        num_heads=vision.whole("num_heads"),
        d_ff=vision.whole("intermediate_size"),
        side=side,
        deep_layers=tuple(deep or ()),
        rope_theta=rope.number("rope_theta", 1e4),
    )


def _rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    decoder = [*around_rules(config), *norm_rules(), *attention_rules(config), *dense_mlp_rules(config)]
    if config.stack.num_moe_layers:
        decoder += expert_rules(layout)
    return (*map(_in_language_model, decoder), *tower_rules(config))


def _in_language_model(rule: Rule) -> Rule:
    if not rule.theirs.startswith("model."):
        return rule
    return dataclasses.replace(rule, theirs=rule.theirs.replace("model.", "model.language_model.", 1))


def tower_rules(config: ModelConfig, theirs: str = "model.visual.", names: MergerNames = MERGERS) -> tuple[Rule, ...]:
    """Rules for the tower.

    Args:
      theirs: the prefix of the tensors' names.
    """
    tower = config.vision_tower
    assert tower is not None
    ours = "vision_tower/"
    rules = [
        Rule(f"{ours}patch/kernel", f"{theirs}patch_embed.proj.weight", Layout("kernel", inputs=tower.patch_shape)),
        Rule(f"{ours}patch/bias", f"{theirs}patch_embed.proj.bias"),
        Rule(f"{ours}positions/table", f"{theirs}pos_embed.weight"),
        *_merger_rules(f"{ours}merger/", f"{theirs}merger.", names),
    ]
    for place in range(len(tower.deep_layers)):
        rules += _merger_rules(f"{ours}deep_merger_{place}/", f"{theirs}{names.deep}.{place}.", names)
    for layer in range(tower.num_layers):
        rules += _block_rules(f"{ours}block_{layer}/", f"{theirs}blocks.{layer}.")
    return tuple(rules)


def _block_rules(ours: str, theirs: str) -> list[Rule]:
    rules = layer_norm_rules(f"{ours}attention_norm/", f"{theirs}norm1.")
    rules += layer_norm_rules(f"{ours}mlp_norm/", f"{theirs}norm2.")
    for place, name in enumerate(("query", "key", "value")):
        part: dict[str, Any] = {"part": (0, place)}
        rules.append(Rule(f"{ours}attention/{name}/kernel", f"{theirs}attn.qkv.weight", KERNEL, **part))
        rules.append(Rule(f"{ours}attention/{name}/bias", f"{theirs}attn.qkv.bias", FLAT, **part))
    rules.append(Rule(f"{ours}attention/out/kernel", f"{theirs}attn.proj.weight", KERNEL_OF_HEADS))
    rules.append(Rule(f"{ours}attention/out/bias", f"{theirs}attn.proj.bias"))
    return rules + gelu_mlp_rules(f"{ours}mlp/", f"{theirs}mlp.", ("linear_fc1", "linear_fc2"))


def _merger_rules(ours: str, theirs: str, names: MergerNames) -> list[Rule]:
    norm = layer_norm_rules(f"{ours}norm/", f"{theirs}{names.norm}.")
    return norm + gelu_mlp_rules(f"{ours}mlp/", theirs, (names.up, names.down))


def layer_norm_rules(ours: str, theirs: str) -> list[Rule]:
    """Rules for the scale and bias of a LayerNorm."""
    return [Rule(f"{ours}scale", f"{theirs}weight"), Rule(f"{ours}bias", f"{theirs}bias")]


def gelu_mlp_rules(ours: str, theirs: str, names: tuple[str, str]) -> list[Rule]:
    """Rules for the two layers of a GELU MLP, with their biases."""
    both = tuple(zip(("up", "down"), names, strict=True))
    kernels = [Rule(f"{ours}{own}/kernel", f"{theirs}{name}.weight", KERNEL) for own, name in both]
    return kernels + [Rule(f"{ours}{own}/bias", f"{theirs}{name}.bias") for own, name in both]


QWEN3_VL = Family(("Qwen3VLForConditionalGeneration",), _dense_config, _rules)
QWEN3_VL_MOE = Family(("Qwen3VLMoeForConditionalGeneration",), _moe_config, _rules, hub_layout="stacked_kernels")

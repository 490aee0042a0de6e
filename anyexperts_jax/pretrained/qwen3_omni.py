"""Qwen3-Omni's thinker: a vision and an audio tower in front of Qwen3's MoE decoder.

The release also has a talker and a vocoder, which turn the answer into speech; they are not read. A checkpoint of the
thinker alone is read too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import AudioTowerConfig, ModelConfig
from anyexperts_jax.pretrained.decoders import (
    around_rules,
    attention_rules,
    dense_mlp_rules,
    expert_rules,
    norm_rules,
)
from anyexperts_jax.pretrained.family import Family
from anyexperts_jax.pretrained.hub_config import HubConfig, keys
from anyexperts_jax.pretrained.qwen3_vl import (
    MOE_KEYS,
    TEXT_KEYS,
    VISION_KEYS,
    MergerNames,
    gelu_mlp_rules,
    layer_norm_rules,
    moe_decoder,
    text_part,
    tower_config,
    tower_rules,
)
from anyexperts_jax.pretrained.rules import FLAT, KERNEL, KERNEL_OF_HEADS, ExpertLayout, Layout, Rule

_WHOLE = keys(
    """
    thinker_config talker_config code2wav_config enable_audio_output im_start_token_id im_end_token_id
    system_token_id user_token_id assistant_token_id tts_pad_token_id tts_bos_token_id tts_eos_token_id
    """
)
_THINKER = keys(
    """
    text_config vision_config audio_config tie_word_embeddings image_token_id video_token_id vision_start_token_id
    vision_end_token_id audio_token_id audio_start_token_id audio_end_token_id position_id_per_seconds
    seconds_per_chunk user_token_id
    """
)
_TEXT = TEXT_KEYS | MOE_KEYS | keys("use_qk_norm shared_expert_intermediate_size")
_VISION = VISION_KEYS | keys("image_size in_chans spatial_patch_size tokens_per_second apply_vit_abs_pos_embed")
_AUDIO = keys(
    """
    num_mel_bins encoder_layers num_hidden_layers encoder_attention_heads encoder_ffn_dim d_model output_dim
    activation_function activation_dropout dropout scale_embedding max_source_positions n_window n_window_infer
    conv_chunksize downsample_hidden_size tie_word_embeddings
    """
)
_MERGERS = MergerNames("merger_list", "ln_q", "mlp.0", "mlp.2")
_POSITIONS = 2304  # num_position_embeddings's default in the class


def _whole_config(hub: HubConfig) -> ModelConfig:
    hub.require_known(_WHOLE)
    return _config(hub.part("thinker_config"))


def _config(hub: HubConfig) -> ModelConfig:
    hub.require_known(_THINKER)
    text = text_part(hub, _TEXT)
    text.only("use_qk_norm", True)
    text.only("shared_expert_intermediate_size", 0)
    decoder = moe_decoder(text, text.flag("norm_topk_prob", True))
    width = decoder.stack.d_model
    return dataclasses.replace(
        decoder,
        tie_embeddings=hub.flag("tie_word_embeddings", False),
        vision_tower=tower_config(_vision(hub), width),
        audio_tower=_audio_config(hub.part("audio_config"), width),
    )


def _vision(hub: HubConfig) -> HubConfig:
    vision = hub.part("vision_config")
    vision.require_known(_VISION | keys("tie_word_embeddings"))
    vision.only("apply_vit_abs_pos_embed", True)
    for key, same in (("in_chans", "in_channels"), ("spatial_patch_size", "patch_size")):
        vision.only(key, vision.get(same))
    return HubConfig({"num_position_embeddings": _POSITIONS, **vision.values}, vision.where)


def _audio_config(audio: HubConfig, out_width: int) -> AudioTowerConfig:
    audio.require_known(_AUDIO)
    audio.only("activation_function", "gelu")
    audio.only("scale_embedding", False)
    layers = audio.whole("encoder_layers")
    audio.only("num_hidden_layers", layers)
    width = audio.whole("output_dim")
    require(width == out_width, f"{audio.where}: output_dim={width} is not the decoder's hidden_size={out_width}")
    chunk, window = 2 * audio.whole("n_window"), audio.whole("n_window_infer")
    fits = chunk > 0 and window >= chunk
    require(fits, f"{audio.where}: n_window_infer={window} must be at least 2 * n_window={chunk}, which must be > 0")
    found = AudioTowerConfig(
        mel_bins=audio.whole("num_mel_bins"),
        chunk_frames=chunk,
        window_chunks=window // chunk,
        channels=audio.whole("downsample_hidden_size"),
        d_model=audio.whole("d_model"),
        num_layers=layers,
        num_heads=audio.whole("encoder_attention_heads"),
        d_ff=audio.whole("encoder_ffn_dim"),
    )
    places = audio.whole("max_source_positions", found.chunk_rows)
    require(
        places >= found.chunk_rows,
        f"{audio.where}: max_source_positions={places} is below the {found.chunk_rows} rows of {chunk} frames",
    )
    return found


def _rules(config: ModelConfig, layout: ExpertLayout, theirs: str = "") -> tuple[Rule, ...]:
    own = [*around_rules(config), *norm_rules(), *attention_rules(config), *dense_mlp_rules(config)]
    own += [*expert_rules(layout), *tower_rules(config, "visual.", _MERGERS), *_audio_rules(config)]
    return tuple(dataclasses.replace(rule, theirs=theirs + rule.theirs) for rule in own)


def _whole_rules(config: ModelConfig, layout: ExpertLayout) -> tuple[Rule, ...]:
    return _rules(config, layout, "thinker.")


def _audio_rules(config: ModelConfig) -> list[Rule]:
    tower = config.audio_tower
    assert tower is not None
    ours, theirs = "audio_tower/", "audio_tower."
    rules = [
        Rule(f"{ours}frame/kernel", f"{theirs}conv_out.weight", KERNEL),
        *layer_norm_rules(f"{ours}norm/", f"{theirs}ln_post."),
        *gelu_mlp_rules(f"{ours}mlp/", theirs, ("proj1", "proj2")),
    ]
    for place, inputs in enumerate((1, tower.channels, tower.channels)):
        layout = Layout("kernel", inputs=(inputs, 3, 3))
        rules.append(Rule(f"{ours}conv_{place}/kernel", f"{theirs}conv2d{place + 1}.weight", layout))
        rules.append(Rule(f"{ours}conv_{place}/bias", f"{theirs}conv2d{place + 1}.bias"))
    for layer in range(tower.num_layers):
        rules += _block_rules(f"{ours}block_{layer}/", f"{theirs}layers.{layer}.")
    return rules


def _block_rules(ours: str, theirs: str) -> list[Rule]:
    rules = layer_norm_rules(f"{ours}attention_norm/", f"{theirs}self_attn_layer_norm.")
    rules += layer_norm_rules(f"{ours}mlp_norm/", f"{theirs}final_layer_norm.")
    for name in ("query", "key", "value"):
        rules.append(Rule(f"{ours}attention/{name}/kernel", f"{theirs}self_attn.{name[0]}_proj.weight", KERNEL))
        rules.append(Rule(f"{ours}attention/{name}/bias", f"{theirs}self_attn.{name[0]}_proj.bias", FLAT))
    rules.append(Rule(f"{ours}attention/out/kernel", f"{theirs}self_attn.out_proj.weight", KERNEL_OF_HEADS))
    rules.append(Rule(f"{ours}attention/out/bias", f"{theirs}self_attn.out_proj.bias"))
    return rules + gelu_mlp_rules(f"{ours}mlp/", theirs, ("fc1", "fc2"))


def _speech_tensors(_: HubConfig) -> tuple[str, ...]:
    return (r"talker\..*", r"code2wav\..*")


def _without_speech(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns speech off in the config.json of an export, which has no talker."""
    return {**values, "enable_audio_output": False}


QWEN3_OMNI_MOE = Family(
    ("Qwen3OmniMoeForConditionalGeneration",),
    _whole_config,
    _whole_rules,
    ignored=_speech_tensors,
    written=_without_speech,
)
QWEN3_OMNI_MOE_THINKER = Family(("Qwen3OmniMoeThinkerForConditionalGeneration",), _config, _rules)

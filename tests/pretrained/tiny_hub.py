"""Tiny config.json values of the published families, and checkpoints with random weights."""

import json

import ml_dtypes
import numpy as np

from anyexperts_jax.pretrained.family import family_of
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import expand, expected_tensors

# All widths differ and 2 F is not D, so that a transposed weight has another shape. They are multiples of four, as
# torch's grouped matmul needs.
COMMON = {
    "vocab_size": 53,
    "hidden_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 20,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 52,
    "pad_token_id": 51,
    "rope_theta": 5000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.6,
    "use_qk_norm": True,
}
QWEN3_MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True}
LATENT = {
    **{key: value for key, value in GROUPED.items() if key not in ("partial_rotary_factor", "use_qk_norm")},
    "num_key_value_heads": 4,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "head_dim": 6,
    "v_head_dim": 10,
    "model_type": "deepseek_v3",
    "rms_norm_eps": 0.05,  # far from the constant of the latents' norms
}
LATENT_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.5}
OLMOE_HEADS = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 14,
}  # so that all heads together have width D
CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama llama3": ("LlamaForCausalLM", {"rope_scaling": LLAMA3}),
    "llama yarn": ("LlamaForCausalLM", {"rope_scaling": YARN}),
    "llama linear": ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", QWEN3_MOE),
    "qwen3_moe raw weights": ("Qwen3MoeForCausalLM", {**QWEN3_MOE, "norm_topk_prob": False}),
    "qwen3_moe pattern": (
        "Qwen3MoeForCausalLM",
        {**QWEN3_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    ),
    "olmoe": ("OlmoeForCausalLM", {**OLMOE_HEADS, "num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.9}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None}),
    "glm4_moe": ("Glm4MoeForCausalLM", {**GROUPED, "model_type": "glm4_moe"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**LATENT, "rope_scaling": {**LATENT_YARN, "mscale_all_dim": 0.8}}),
    "deepseek_v3 full queries": (  # as in Moonlight: queries without a latent, one group
        "DeepseekV3ForCausalLM",
        {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "attention_bias": True},
    ),
    "sarvam_moe": ("Glm4MoeForCausalLM", {**GROUPED, "model_type": "sarvam_moe"}),
}
MODEL_TYPES = {"Llama": "llama", "Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe", "Olmoe": "olmoe", "Mixtral": "mixtral"}


def hub_values(case, **changes):
    """Returns the config.json values of a case."""
    architecture, own = CASES[case]
    kind = own.get("model_type", MODEL_TYPES.get(architecture.removesuffix("ForCausalLM")))
    return {"architectures": [architecture], "model_type": kind, **COMMON, **own, **changes}


def random_tensors(values, stacked=False, seed=0, dtype=np.float32):
    """Returns random values for every tensor of a checkpoint; the router's bias is always float32."""
    hub = HubConfig(values, "config.json")
    _, family = family_of(hub)
    config = family.config(hub)
    tensors, random = {}, np.random.default_rng(seed)
    layout = "stacked" if stacked else family.hub_layout
    for name, tensor in expected_tensors(expand(family.rules(config, layout), config)).items():
        scale = 1.0 if len(tensor.shape) == 1 else tensor.shape[-1] ** -0.5
        value = scale * random.standard_normal(tensor.shape) + (1.0 if "norm" in name else 0.0)
        tensors[name] = value.astype(np.float32 if name.endswith("bias") else dtype)
    return tensors


def write_checkpoint(folder, values, tensors, files=1):
    """Writes a checkpoint folder as on the hub, with the weights in this many files."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    names = list(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    file_of = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(file_of.values()):
        save_file({name: tensors[name] for name in names if file_of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return folder


def tiny_checkpoint(folder, case, *, stacked=False, seed=0, dtype=np.float32, files=1, **changes):
    """Writes a case's checkpoint with random weights."""
    values = hub_values(case, **changes)
    return write_checkpoint(folder, values, random_tensors(values, stacked, seed, dtype), files)


def tensors_in(folder):
    """Reads the tensors of all files of a folder."""
    from safetensors.numpy import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


BFLOAT16 = ml_dtypes.bfloat16

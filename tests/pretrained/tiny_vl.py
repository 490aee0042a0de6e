"""Tiny Qwen3-VL checkpoints, and scenes: tokens with placeholders for pictures and videos."""

import dataclasses
import json
import math

import numpy as np

from anyexperts_jax.core.modality import Modality
from anyexperts_jax.pretrained.pictures import Patches
from pretrained.tiny_hub import random_tensors, write_checkpoint

IDS = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7}
MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")  # the ids of a trained tokenizer
TEXT = {
    "vocab_size": 300,
    "hidden_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 20,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 5000.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True},
}
MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True}
VISION = {
    "depth": 3,
    "hidden_size": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 20,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 28,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}
PREPROCESSOR = {
    "size": {"shortest_edge": 64, "longest_edge": 2048},
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<|vision_start|>"
    "{{ '<|image_pad|>' if p.type == 'image' else '<|video_pad|>' }}<|vision_end|>{% endif %}{% endfor %}{% endif %}"
    "<|sep|>\n{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


def vl_values(moe=True, text=None, vision=None, **top):
    """Returns the config.json of a tiny model; a change to None deletes a key."""
    kind = "qwen3_vl_moe" if moe else "qwen3_vl"
    own = {
        "architectures": ["Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"],
        "model_type": kind,
        "text_config": changed({"model_type": f"{kind}_text", **TEXT, **(MOE if moe else {})}, text),
        "vision_config": changed({"model_type": f"{kind}_vision", **VISION}, vision),
        "tie_word_embeddings": False,
        **IDS,
    }
    return changed(own, top)


def changed(values, changes):
    return {key: value for key, value in {**values, **(changes or {})}.items() if value is not None}


def vl_checkpoint(folder, moe=True, *, stacked=False, seed=0, **changes):
    """Writes a checkpoint with random weights and preprocessor settings."""
    values = vl_values(moe, **changes)
    made = write_checkpoint(folder, values, random_tensors(values, stacked, seed))
    (made / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (made / "video_preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "fps": 2, "min_frames": 2}))
    return made


def patches(grid, modality=Modality.IMAGE, seed=0):
    """Returns random patches of a grid (pairs of frames, rows, columns)."""
    random = np.random.default_rng(seed)
    return Patches(random.standard_normal((math.prod(grid), 96)).astype(np.float32), grid, modality, ())


@dataclasses.dataclass(frozen=True)
class Scene:
    """Rows of tokens, padded on the right, and their media in reading order."""

    tokens_BT: np.ndarray
    valid_BT: np.ndarray
    images: list
    videos: list


def scene(*rows):
    """Builds a scene. A row is a list of ids, pictures and videos; each item becomes placeholders between two ids."""
    made, images, videos = [], [], []
    for parts in rows:
        ids = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            image = part.modality is Modality.IMAGE
            (images if image else videos).append(part)
            for _ in range(part.grid[0]):
                own = IDS["image_token_id" if image else "video_token_id"]
                ids += [
                    IDS["vision_start_token_id"],
                    *[own] * (part.patches_per_frame // 4),
                    IDS["vision_end_token_id"],
                ]
        made.append(ids)
    longest = max(map(len, made))
    tokens_BT = np.array([ids + [0] * (longest - len(ids)) for ids in made])
    valid_BT = np.array([[t < len(ids) for t in range(longest)] for ids in made])
    return Scene(tokens_BT, valid_BT, images, videos)


def scenes(seed=0):
    """Scenes with text, one picture, pictures of different sizes in a padded batch, and a video."""
    wide, small, tall = (patches(g, seed=seed + i) for i, g in enumerate([(1, 6, 10), (1, 4, 2), (1, 10, 4)]))
    film = patches((3, 4, 6), Modality.VIDEO, seed + 3)
    return {
        "text": scene([9, 8, 30, 41, 12, 77, 21], [13, 14]),
        "one image": scene([9, 8, wide, 30, 41]),
        "two images": scene([9, tall, 8, 12, small, 30], [wide, 41]),
        "video": scene([9, 8, film, 30, small, 31]),
    }

"""Tiny Qwen3-Omni checkpoints, and scenes with sounds beside pictures and videos."""

import dataclasses
import json

import numpy as np

from anyexperts_jax.core.modality import Modality
from anyexperts_jax.pretrained.sounds import Sound
from pretrained import tiny_vl
from pretrained.tiny_hub import random_tensors, write_checkpoint
from pretrained.tiny_vl import MOE, PREPROCESSOR, TEXT, VISION, changed, patches

IDS = {
    **tiny_vl.IDS,
    "audio_token_id": 8,
    "audio_start_token_id": 9,
    "audio_end_token_id": 10,
}
MARKS = (*tiny_vl.MARKS, "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>")
AUDIO = {
    "num_mel_bins": 10,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 14,
    "d_model": 12,
    "output_dim": 28,
    "downsample_hidden_size": 6,
    "max_source_positions": 40,
    "n_window": 50,  # transformers assumes 13 rows per chunk, which 100 frames give
    "n_window_infer": 200,
    "activation_function": "gelu",
    "scale_embedding": False,
}
SOUNDS = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 10,
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 400,
    "dither": 0.0,
    "padding_value": 0.0,
    "return_attention_mask": True,
}
TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% elif p.type == 'audio' or 'audio' in p %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% elif p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}"
    "<|sep|>\n{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


def omni_values(*, alone=False, text=None, vision=None, audio=None, thinker=None, **top):
    """Returns the config.json of a tiny model, or of its thinker alone; a change to None deletes a key."""
    own = {
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": changed({"model_type": "qwen3_omni_moe_text", **TEXT, **MOE}, text),
        "vision_config": changed({"model_type": "qwen3_omni_moe_vision_encoder", **VISION}, vision),
        "audio_config": changed({"model_type": "qwen3_omni_moe_audio_encoder", **AUDIO}, audio),
        "position_id_per_seconds": 13,
        **IDS,
    }
    own = changed(own, thinker)
    if alone:
        return changed({"architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"], **own}, top)
    whole = {"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe"}
    return changed({**whole, "thinker_config": own, "enable_audio_output": False}, top)


def omni_checkpoint(folder, *, seed=0, more=None, **changes):
    """Writes a checkpoint with random weights, and all preprocessor settings in one file as in the release.

    Args:
      more: further tensors.
    """
    values = omni_values(**changes)
    made = write_checkpoint(folder, values, {**random_tensors(values, False, seed), **(more or {})})
    (made / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **SOUNDS}))
    return made


def sound(frames, seed=0):
    """Random frames."""
    random = np.random.default_rng(seed)
    return Sound(random.standard_normal((frames, AUDIO["num_mel_bins"])).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Scene:
    """Rows of tokens, padded on the right, and their media in reading order."""

    tokens_BT: np.ndarray
    valid_BT: np.ndarray
    media: dict  # images, videos and audios

    def __getattr__(self, name):
        return self.media[name]


def scene(*rows):
    """Builds a scene. A row is a list of ids and media; each item becomes its placeholders between two ids."""
    made, media = [], {"images": [], "videos": [], "audios": []}
    for parts in rows:
        ids = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            kind = part.modality.name.lower()
            media[f"{kind}s"].append(part)
            heard = part.modality is Modality.AUDIO
            count = rows_of(len(part.mel_SX)) if heard else part.grid[0] * part.patches_per_frame // 4
            opens, closes = (f"{'audio' if heard else 'vision'}_{end}_token_id" for end in ("start", "end"))
            ids += [IDS[opens], *[IDS[f"{kind}_token_id"]] * count, IDS[closes]]
        made.append(ids)
    longest = max(map(len, made))
    tokens_BT = np.array([ids + [0] * (longest - len(ids)) for ids in made])
    valid_BT = np.array([[t < len(ids) for t in range(longest)] for ids in made])
    return Scene(tokens_BT, valid_BT, media)


def rows_of(frames):
    """Returns the number of a sound's rows: 13 per hundred frames, and an eighth of the rest, rounded up."""
    return frames // 100 * 13 + -(-(frames % 100) // 8)


def scenes(seed=0):
    """Scenes with text, sounds of several lengths, pictures, a video, and all of them in padded batches."""
    long, odd, short = (sound(frames, seed + i) for i, frames in enumerate((430, 137, 61)))
    wide, small = patches((1, 4, 8), seed=seed), patches((1, 4, 2), seed=seed + 1)
    film = patches((3, 4, 6), Modality.VIDEO, seed + 3)._replace(pair_seconds=2 / 3)
    return {
        "text": scene([19, 18, 30, 41, 12, 77, 21], [13, 14]),
        "one sound": scene([19, 18, odd, 30, 41]),
        "a sound of less than a chunk": scene([19, short, 30]),
        "a sound of three windows": scene([19, long, 30]),
        "two sounds": scene([19, odd, 18, 12, long._replace(mel_SX=long.mel_SX[:200]), 30], [odd, 41]),
        "picture": scene([19, 18, wide, 30, 41]),
        "picture and sound": scene([19, wide, 18, odd, 30, small, 41], [13, odd, 12]),
        "video and sound": scene([19, 18, film, 30, odd, 31, film, 17]),
    }

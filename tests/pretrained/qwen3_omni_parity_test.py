"""Qwen3-Omni against transformers, from tiny random checkpoints: logits, experts, answers, features, export."""

import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from anyexperts_jax.pretrained.budget import BudgetInForce
from anyexperts_jax.pretrained.decode import Request, decode
from anyexperts_jax.pretrained.sounds import Hearing, mel_filters
from pretrained.tiny_hub import tensors_in
from pretrained.tiny_omni import IDS, Scene, omni_checkpoint, omni_values, rows_of, scenes
from pretrained.torch_routing import logits_and_choices

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def theirs(folder):
    """transformers' thinker, in float32."""
    cls = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def inputs(seen):
    """Returns transformers' inputs for a scene."""
    found = {"attention_mask": torch.tensor(seen.valid_BT).long()}
    for kind, suffix, own in (("image", "", seen.images), ("video", "_videos", seen.videos)):
        if own:
            found[f"pixel_values{suffix}"] = torch.tensor(np.concatenate([one.patches_NX for one in own]))
            found[f"{kind}_grid_thw"] = torch.tensor([one.grid for one in own])
    if seen.videos:
        found["video_second_per_grid"] = torch.tensor([one.pair_seconds for one in seen.videos])
    if seen.audios:
        longest = max(len(one.mel_SX) for one in seen.audios)
        padded = [np.pad(one.mel_SX, ((0, longest - len(one.mel_SX)), (0, 0))).T for one in seen.audios]
        mask = [[i < len(one.mel_SX) for i in range(longest)] for one in seen.audios]
        found["input_features"] = torch.tensor(np.stack(padded))
        found["feature_attention_mask"] = torch.tensor(mask).long()
    return found


def compare(model, own, seen, name):
    expected_BTY, chosen = logits_and_choices(own, seen.tokens_BT, inputs(seen), "TextTopKRouter")
    output = model.forward(seen.tokens_BT, seen.valid_BT, **seen.media)
    ours_BTY, valid_BT = np.asarray(output.logits_BTY), seen.valid_BT
    np.testing.assert_allclose(ours_BTY[valid_BT], expected_BTY[valid_BT], rtol=1e-4, atol=1e-4, err_msg=name)
    assert len(chosen) == model.config.stack.num_moe_layers
    for layer, their_BTK in enumerate(chosen):
        ours_BTK = np.asarray(output.trace.expert_ids_BTK)[layer]
        np.testing.assert_array_equal(np.sort(ours_BTK[valid_BT]), np.sort(their_BTK[valid_BT]), err_msg=name)


MODELS = {
    "whole": ({}, 0, None),
    "another seed": ({}, 7, ["two sounds", "picture and sound"]),
    "thinker alone, raw weights": ({"alone": True, "text": {"norm_topk_prob": False}}, 3, ["text", "one sound"]),
    "other layers": ({"text": {"mlp_only_layers": [0]}, "audio": {"encoder_layers": 1}}, 5, ["picture and sound"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_chosen_experts(tmp_path, name):
    changes, seed, scene_names = MODELS[name]
    folder = omni_checkpoint(tmp_path / "hub", seed=seed, **changes)
    model, own = load_pretrained(folder), theirs(folder)
    every = scenes(10 * seed)
    for scene_name in scene_names or every:
        compare(model, own, every[scene_name], scene_name)


@pytest.mark.parametrize("name", ["one sound", "picture and sound", "video and sound"])
def test_16_greedy_tokens(tmp_path, name):
    folder = omni_checkpoint(tmp_path / "hub", seed=5)
    model, own, seen = load_pretrained(folder), theirs(folder), scenes(7)[name]
    tokens_BT, valid_BT = seen.tokens_BT[:1], seen.valid_BT[:1]
    prompt = tokens_BT[0, valid_BT[0]].tolist()
    places = {kind: prompt.count(IDS[f"{kind}_start_token_id"]) for kind in ("vision", "audio")}
    videos = seen.videos[: places["vision"]] if seen.videos else []
    images = [] if videos else seen.images[: places["vision"]]
    media = {"images": images, "videos": videos, "audios": seen.audios[: places["audio"]]}
    first = Scene(np.array([prompt]), np.ones((1, len(prompt)), bool), media)
    shown = model.show(**media)
    found = decode(model.weights, [prompt], Request(16), BudgetInForce(), lambda row, token: True, shown=shown)
    with torch.no_grad():
        ids = own.generate(
            torch.tensor([prompt]), **inputs(first), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
    assert found.tokens[0] == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("alone", [False, True])
def test_transformers_reads_our_export_and_we_read_its_save(tmp_path, alone):
    folder = omni_checkpoint(tmp_path / "hub", seed=2, alone=alone)
    model = load_pretrained(folder)
    model.export(tmp_path / "out")
    cls = getattr(transformers, omni_values(alone=alone)["architectures"][0])
    own = cls.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    seen = scenes(3)["picture and sound"]
    compare(model, own if alone else own.thinker, seen, "written by us")
    own.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    assert again.config == model.config
    again.export(tmp_path / "again")
    first, second = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("samples", [201, 1600, 1601, 16159, 40000])
def test_log_mel_frames_agree(samples):
    """Compared one sound at a time, with the arguments that the processor passes to the extractor."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    random = np.random.default_rng(samples)
    wave = (0.3 * random.standard_normal(samples) * np.linspace(0, 1, samples)).astype(np.float32)
    asked = {"sampling_rate": 16000, "padding": True, "truncation": False, "return_attention_mask": True}
    expected = extractor([wave], **asked)
    ours_SX = Hearing(bands=128, window=400, hop=160).log_mel(wave)
    assert len(ours_SX) == expected["attention_mask"].sum()
    np.testing.assert_allclose(ours_SX, expected["input_features"][0].T[: len(ours_SX)], atol=1e-4)


def test_mel_filters_agree():
    expected = transformers.WhisperFeatureExtractor(feature_size=128).mel_filters
    np.testing.assert_allclose(mel_filters(400, 128), expected, rtol=1e-5, atol=1e-8)


def test_the_number_of_rows_of_a_sound_agrees():
    from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import _get_feat_extract_output_lengths

    for frames in range(1, 460):
        assert rows_of(frames) == _get_feat_extract_output_lengths(frames)

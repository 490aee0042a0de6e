"""Qwen3-Omni against transformers, from tiny random checkpoints: logits, experts, answers, features, export."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from anyexperts_jax.core.batch import make_batch
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.pretrained.budget import BudgetInForce
from anyexperts_jax.pretrained.decode import Request, decode
from anyexperts_jax.pretrained.placing import place
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


def rows_alone(seen):
    """A scene for each row, without padding."""
    at, found = {"images": 0, "videos": 0, "audios": 0}, []
    for tokens_T, valid_T in zip(seen.tokens_BT, seen.valid_BT, strict=True):
        ids = tokens_T[valid_T]
        heard = int((ids == IDS["audio_start_token_id"]).sum())
        shown = int((ids == IDS["vision_start_token_id"]).sum())
        counts = {"images": 0 if seen.videos else shown, "videos": shown if seen.videos else 0, "audios": heard}
        media = {kind: seen.media[kind][at[kind] : at[kind] + count] for kind, count in counts.items()}
        at = {kind: at[kind] + count for kind, count in counts.items()}
        found.append(Scene(ids[None], np.ones((1, len(ids)), bool), media))
    return found


@pytest.mark.parametrize("name", ["text", "two sounds", "picture and sound", "video and sound"])
def test_32_greedy_tokens(tmp_path, name):
    """All rows at once, of different lengths; transformers answers one after another."""
    folder = omni_checkpoint(tmp_path / "hub", seed=5)
    model, own, seen = load_pretrained(folder), theirs(folder), scenes(7)[name]
    alone = rows_alone(seen)
    prompts = [one.tokens_BT[0].tolist() for one in alone]
    shown = model.show(**seen.media)
    found = decode(model.weights, prompts, Request(32), BudgetInForce(), lambda row, token: True, shown=shown)
    for one, prompt, answer in zip(alone, prompts, found.tokens, strict=True):
        with torch.no_grad():
            ids = own.generate(
                torch.tensor([prompt]), **inputs(one), max_new_tokens=32, do_sample=False, eos_token_id=None
            )
        assert answer == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["two sounds", "picture and sound"])
def test_padding_on_the_left(tmp_path, name):
    folder, seen = omni_checkpoint(tmp_path / "hub", seed=6), scenes(8)[name]
    tokens_BT, valid_BT = np.zeros_like(seen.tokens_BT), np.zeros_like(seen.valid_BT)
    for row, one in enumerate(rows_alone(seen)):
        tokens_BT[row, -one.tokens_BT.shape[1] :] = one.tokens_BT[0]
        valid_BT[row, -one.tokens_BT.shape[1] :] = True
    assert not valid_BT.all()
    compare(load_pretrained(folder), theirs(folder), Scene(tokens_BT, valid_BT, seen.media), name)


@pytest.mark.parametrize("name", ["two sounds", "picture and sound", "video and sound"])
def test_gradients(tmp_path, name):
    """Of the decoder, its experts and both towers, from a padded batch."""
    folder = omni_checkpoint(tmp_path / "hub", seed=4, alone=True)
    model, own, seen = load_pretrained(folder), theirs(folder), scenes(5)[name]
    targets_BT = np.where(seen.valid_BT, seen.tokens_BT, -100)
    own(torch.tensor(seen.tokens_BT), **inputs(seen), labels=torch.tensor(targets_BT)).loss.backward()
    placed = place(model.show(**seen.media), seen.tokens_BT, seen.valid_BT).media
    positions_BT = jnp.asarray(np.maximum(seen.valid_BT.cumsum(axis=1) - 1, 0), jnp.int32)
    tokens_BT, valid_BT = jnp.asarray(seen.tokens_BT, jnp.int32), jnp.asarray(seen.valid_BT)

    @jax.jit
    @jax.grad
    def gradient(params):
        batch = make_batch(tokens_BT, valid_BT=valid_BT, position_BT=positions_BT)
        output = MultimodalModel(model.config).apply({"params": params}, batch, placed=placed)
        logs_BTY = jax.nn.log_softmax(output.logits_BTY)[:, :-1]
        nats_BT = -jnp.take_along_axis(logs_BTY, tokens_BT[:, 1:, None], axis=-1)[..., 0]
        return jnp.where(valid_BT[:, 1:], nats_BT, 0).sum() / float(seen.valid_BT[:, 1:].sum())

    # As a model whose weights are the gradients, in their names.
    dataclasses.replace(model, params=gradient(model.params)).export(tmp_path / "gradients")
    found, compared = tensors_in(tmp_path / "gradients"), set()
    for name_in_torch, weight in own.named_parameters():
        key = name_in_torch
        for inside, in_files in (("language_model", "model"), ("audio_tower", "audio_tower"), ("visual", "visual")):
            key = key.replace(f"model.{inside}.", f"{in_files}.", 1)
        grad = np.zeros(weight.shape, np.float32) if weight.grad is None else weight.grad.numpy()
        if key in found:
            names, parts = [key], [grad]
        else:  # experts are stacked in theirs, gate before up
            prefix = key.removesuffix("gate_up_proj").removesuffix("down_proj")
            kinds = ("gate_proj", "up_proj") if key.endswith("gate_up_proj") else ("down_proj",)
            names = [f"{prefix}{e}.{kind}.weight" for e in range(len(grad)) for kind in kinds]
            parts = [part for one in grad for part in np.split(one, len(kinds))]
        for one, part in zip(names, parts, strict=True):
            np.testing.assert_allclose(found[one], part, rtol=2e-3, atol=3e-6, err_msg=one)
        compared |= set(names)
    assert compared == set(found)
    towers = {"audio_tower"} | ({"visual"} if seen.images or seen.videos else set())
    for tower in towers:
        assert max(np.abs(found[key]).max() for key in found if key.startswith(tower)) > 1e-3


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

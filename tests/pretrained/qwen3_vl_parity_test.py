"""Qwen3-VL against transformers, from tiny random checkpoints: logits, chosen experts, greedy answers, export."""

import json
import types

import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from anyexperts_jax.core.registries import FAMILIES
from anyexperts_jax.pretrained.budget import BudgetInForce
from anyexperts_jax.pretrained.decode import Request, decode
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.pictures import Video, read_preprocessing
from pretrained.tiny_hub import tensors_in
from pretrained.tiny_vl import IDS, PREPROCESSOR, scenes, vl_checkpoint, vl_values
from pretrained.torch_routing import logits_and_choices

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

MODELS = {
    "dense": {"moe": False, "text": {"attention_bias": True}},
    "tied": {"moe": False, "tie_word_embeddings": True, "vision": {"deepstack_visual_indexes": [1]}},
    "moe": {},
    "moe stacked": {"stacked": True, "text": {"mlp_only_layers": [0]}},
    "moe pattern": {"text": {"num_hidden_layers": 4, "decoder_sparse_step": 2}},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def theirs(folder):
    """transformers' model, in float32."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def inputs(seen):
    """Returns transformers' inputs for a scene."""
    found = {"attention_mask": torch.tensor(seen.valid_BT).long()}
    for kind, suffix, own in (("image", "", seen.images), ("video", "_videos", seen.videos)):
        if own:
            found[f"pixel_values{suffix}"] = torch.tensor(np.concatenate([one.patches_NX for one in own]))
            found[f"{kind}_grid_thw"] = torch.tensor([one.grid for one in own])
    if seen.images or seen.videos:
        kinds_BT = (seen.tokens_BT == IDS["image_token_id"]) + 2 * (seen.tokens_BT == IDS["video_token_id"])
        found["mm_token_type_ids"] = torch.tensor(kinds_BT)
    return found


def compare(model, own, seen, name):
    expected_BTY, chosen = logits_and_choices(own, seen.tokens_BT, inputs(seen), "TopKRouter")
    output = model.forward(seen.tokens_BT, seen.valid_BT, images=seen.images, videos=seen.videos)
    ours_BTY, valid_BT = np.asarray(output.logits_BTY), seen.valid_BT
    np.testing.assert_allclose(ours_BTY[valid_BT], expected_BTY[valid_BT], rtol=1e-4, atol=1e-4, err_msg=name)
    assert len(chosen) == model.config.stack.num_moe_layers
    for layer, their_BTK in enumerate(chosen):
        ours_BTK = np.asarray(output.trace.expert_ids_BTK)[layer]
        np.testing.assert_array_equal(np.sort(ours_BTK[valid_BT]), np.sort(their_BTK[valid_BT]), err_msg=name)


@pytest.mark.parametrize(("name", "seed"), [*((name, seed) for seed, name in enumerate(MODELS)), ("moe", 7)])
def test_logits_and_chosen_experts(tmp_path, name, seed):
    folder = vl_checkpoint(tmp_path / "hub", seed=seed, **MODELS[name])
    model, own = load_pretrained(folder), theirs(folder)
    for scene_name, seen in scenes(10 * seed).items():
        compare(model, own, seen, scene_name)


@pytest.mark.parametrize(("moe", "scene_name"), [(True, "one image"), (True, "video"), (False, "one image")])
def test_16_greedy_tokens(tmp_path, moe, scene_name):
    folder = vl_checkpoint(tmp_path / "hub", moe, seed=5)
    model, own, seen = load_pretrained(folder), theirs(folder), scenes(7)[scene_name]
    (prompt,) = seen.tokens_BT.tolist()
    shown = model.show(seen.images, seen.videos)
    found = decode(model.weights, [prompt], Request(16), BudgetInForce(), lambda row, token: True, shown=shown)
    with torch.no_grad():
        ids = own.generate(
            torch.tensor([prompt]), **inputs(seen), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
    assert found.tokens[0] == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("moe", [True, False])
def test_transformers_reads_our_export_and_we_read_its_save(tmp_path, moe):
    """transformers saves the rope settings under one key, and the experts transposed."""
    folder = vl_checkpoint(tmp_path / "hub", moe, stacked=True, seed=2)
    model = load_pretrained(folder)
    model.export(tmp_path / "out")
    seen, own = scenes(3)["two images"], theirs(tmp_path / "out")
    compare(model, own, seen, "written by us")
    own.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    compare(again, own, seen, "saved by transformers")
    again.export(tmp_path / "again")
    first, second = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_older_keys_of_the_rope_settings_are_written_too(tmp_path):
    folder = vl_checkpoint(tmp_path / "hub")
    theirs(folder).save_pretrained(tmp_path / "saved")
    load_pretrained(tmp_path / "saved").export(tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == vl_values()["text_config"]["rope_theta"]
    assert text["rope_scaling"]["mrope_section"] == [2, 2, 2]


@pytest.mark.parametrize("size", [(37, 21), (9, 50), (64, 48), (5, 7)])
def test_patches_of_pictures_agree(tmp_path, size):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    folder = vl_checkpoint(tmp_path / "hub")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    settings = {key: value for key, value in PREPROCESSOR.items() if key != "image_processor_type"}
    expected = module.Qwen2VLImageProcessorPil(**settings)([pixels], return_tensors="np")
    found = read_preprocessing(folder, load_pretrained(folder).config.vision_tower).picture(pixels, "it")
    assert list(found.grid) == expected["image_grid_thw"][0].tolist()
    np.testing.assert_allclose(found.patches_NX, expected["pixel_values"], atol=1e-5)


@pytest.mark.parametrize(("total", "fps"), [(9, 4), (5, 2.0), (31, 10), (64, 25.0), (7, 30), (40, 1.5)])
def test_frames_and_seconds_of_videos_agree(tmp_path, total, fps):
    sampling = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    telling = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    asked = types.SimpleNamespace(fps=2, min_frames=4, max_frames=12)
    video = types.SimpleNamespace(total_num_frames=total, fps=fps)
    expected = sampling.Qwen3VLVideoProcessor.sample_frames(asked, video)
    seconds = telling.Qwen3VLProcessor._calculate_timestamps(None, expected, fps, 2)
    height, width = sampling.smart_resize(len(expected), 21, 37, 2, factor=8, min_pixels=64, max_pixels=9000)
    settings = {**PREPROCESSOR, "size": {"shortest_edge": 64, "longest_edge": 9000}, "min_frames": 4, "max_frames": 12}
    plain = {"do_rescale": False, "do_normalize": False}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({**settings, **plain}))
    frames = np.broadcast_to(np.arange(total, dtype=np.uint8)[:, None, None, None], (total, 21, 37, 3))
    tower = FAMILIES["qwen3_vl"].config(HubConfig(vl_values(moe=False), "config.json")).vision_tower
    found = read_preprocessing(tmp_path, tower, videos=True).video(Video(frames, fps), "it")
    assert found.grid == (len(seconds), height // 4, width // 4)
    assert found.seconds == pytest.approx(seconds)
    in_pairs = found.patches_NX.reshape(found.grid[0], -1, 3, 2, 16)[
        :, 0, 0, :, 0
    ]  # the value of a pixel identifies its frame
    padded = [*expected, *expected[len(expected) - len(expected) % 2 :]]
    assert in_pairs.ravel().tolist() == padded

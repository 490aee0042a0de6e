"""Qwen3-VL: reading and writing, pictures in prompts, budgets, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from anyexperts_jax import attach, detach, load_pretrained
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.pretrained.budget import with_budget
from anyexperts_jax.pretrained.decode import Request, decode
from anyexperts_jax.pretrained.pictures import Video
from anyexperts_jax.pretrained.placing import place
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.tokenizers.train import train_tokenizer
from pretrained.tiny_hub import random_tensors, tensors_in, tiny_checkpoint, write_checkpoint
from pretrained.tiny_vl import IDS, MARKS, PREPROCESSOR, TEMPLATE, patches, scene, vl_checkpoint, vl_values

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

WIDE, SMALL = patches((1, 4, 8)), patches((1, 4, 2), seed=1)
PIXELS = np.random.default_rng(0).integers(0, 256, (21, 37, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = vl_checkpoint(tmp_path_factory.mktemp("hub") / "moe")
    tokenizer = train_tokenizer(["Hello world", "cat on the mat; the cat", "A cat sat"], 300, special=MARKS)
    tokenizer.save(made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    Image.fromarray(PIXELS).save(made / "cat.png")
    return made


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder)


@pytest.mark.parametrize(("moe", "stacked"), [(False, False), (True, False), (True, True)])
def test_an_export_equals_the_checkpoint_bit_for_bit(tmp_path, moe, stacked):
    first = vl_checkpoint(tmp_path / "hub", moe, stacked=stacked)
    model = load_pretrained(first)
    model.export(tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    again.export(tmp_path / "again")
    read, written, twice = (tensors_in(path) for path in (first, tmp_path / "out", tmp_path / "again"))
    assert read.keys() == written.keys() == twice.keys()
    for name, value in read.items():
        swapped = stacked and "experts." in name
        np.testing.assert_array_equal(np.swapaxes(value, 1, 2) if swapped else value, written[name], err_msg=name)
        np.testing.assert_array_equal(written[name], twice[name])
    assert again.config == model.config


CONFIGS = [
    (
        {"text": {"moe_intermediate_size": 14}},
        "with hidden_size=28 and moe_intermediate_size=14 the shapes do not tell",
    ),
    ({"text": {"norm_topk_prob": False}}, "norm_topk_prob=False is not supported, only true"),
    ({"text": {"window_attention": 3}}, "text_config: window_attention=3: not supported by this family"),
    ({"text": {"rope_theta": None}}, "text_config: rope_theta is nowhere"),
    ({"text": {"rope_scaling": {"mrope_interleaved": False}}}, "mrope_interleaved=False is not supported"),
    ({"text": {"rope_scaling": {"mrope_section": [2, 2]}}}, "mrope_section=[2, 2] must be three whole numbers"),
    ({"text": {"rope_scaling": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor=0.5: not supported"),
    ({"vision": {"hidden_act": "silu"}}, "vision_config: hidden_act='silu' is not supported"),
    ({"vision": {"fullatt_block_indexes": [1]}}, "fullatt_block_indexes=[1]: not supported by this family"),
    ({"vision": {"num_position_embeddings": 24}}, "num_position_embeddings=24 is no square"),
    ({"vision": {"deepstack_visual_indexes": [2, 0]}}, "deep_layers=(2, 0) must rise within the 3 layers"),
    ({"vision": {"deepstack_visual_indexes": [3]}}, "deep_layers=(3,) must rise within the 3 layers"),
    ({"vision": {"out_hidden_size": 24}}, "out_hidden_size=24 is not the decoder's hidden_size=28"),
    ({"vision": {"hidden_size": 26}}, "d_model=26 / num_heads=2 must be a multiple of 4"),
    ({"vision": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type='yarn' is not supported"),
    ({"vision": {"patch_size": 5}}, "patch_embed.proj.weight is [24, 3, 2, 4, 4], config.json wants [24, 3, 2, 5, 5]"),
    ({"vision": {"depth": 2, "deepstack_visual_indexes": [0]}}, "that nothing reads: model.visual.blocks.2."),
    ({"audio_config": {"depth": 2}}, "audio_config={'depth': 2}: not supported by this family"),
    ({"vision_config": None}, "has no vision_config"),
    ({"text_config": 3}, "text_config=3 must be an object"),
]


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(vl_values())


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[message[:40] for _, message in CONFIGS])
def test_an_unsupported_config_is_refused_by_name(tmp_path, tensors, changes, message):
    write_checkpoint(tmp_path / "hub", vl_values(**changes), tensors)
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "hub")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_positions_after_a_picture_continue_past_its_longer_side(model):
    seen = scene([9, WIDE, 30, 31], [SMALL])
    placed = place(model.show(seen.images), seen.tokens_BT, seen.valid_BT)
    rotary_T3 = np.asarray(placed.media.rotary_BT3)[0]
    assert rotary_T3[:2].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert rotary_T3[2:10].tolist() == [[2, 2 + row, 2 + column] for row in range(2) for column in range(4)]
    assert rotary_T3[10:].tolist() == [[6 + t] * 3 for t in range(3)]
    assert np.asarray(placed.lead_B).tolist() == [8 - 4, 2 - 2]
    assert np.asarray(placed.media.modality_BT)[0].tolist() == [0, 0, *[Modality.IMAGE] * 8, 0, 0, 0]


def test_a_picture_affects_only_later_tokens_of_its_row(model):
    seen = scene([9, 8, WIDE, 30], [SMALL, 9])
    logits_BTY = np.asarray(model.logits(seen.tokens_BT, seen.valid_BT, images=[WIDE, SMALL]))
    other = WIDE._replace(patches_NX=WIDE.patches_NX + 1)
    others_BTY = np.asarray(model.logits(seen.tokens_BT, seen.valid_BT, images=[other, SMALL]))
    np.testing.assert_array_equal(logits_BTY[0, :3], others_BTY[0, :3])
    assert np.abs(logits_BTY[0, 3:] - others_BTY[0, 3:]).max() > 1e-3
    np.testing.assert_array_equal(logits_BTY[1], others_BTY[1])


@pytest.mark.parametrize("budget", [None, pytest.param(1.5, marks=pytest.mark.slow)])
def test_greedy_tokens_equal_those_of_full_forward_passes(model, budget):
    seen = scene([9, WIDE, 30], [8, SMALL])
    prompts = [own[valid].tolist() for own, valid in zip(seen.tokens_BT, seen.valid_BT, strict=True)]
    config, in_force = with_budget(model.config, budget)
    weights = dataclasses.replace(model.weights, config=config)
    shown = model.show(seen.images)
    found = decode(weights, prompts, Request(4), in_force, lambda row, token: True, shown=shown).tokens
    longest = max(map(len, prompts)) + 4
    texts = [list(prompt) for prompt in prompts]
    for _ in range(4):  # rows of constant length, so that one program is compiled
        tokens_BT = np.array([text + [0] * (longest - len(text)) for text in texts])
        valid_BT = np.array([[t < len(text) for t in range(longest)] for text in texts])
        logits_BTY = np.asarray(model.logits(tokens_BT, valid_BT, budget, images=seen.images))
        for row, text in enumerate(texts):
            text.append(int(logits_BTY[row, len(text) - 1].argmax()))
    assert found == [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@pytest.mark.slow
def test_attached_slots_start_as_the_base_on_pictures(model):
    seen = scene([9, WIDE, 30])
    attached = attach(model, k_min=2, k_max=4, num_virtual=2)
    base_BTY = np.asarray(model.logits(seen.tokens_BT, images=[WIDE]))
    np.testing.assert_array_equal(attached.logits(seen.tokens_BT, images=[WIDE]), base_BTY)
    assert detach(attached).config == model.config
    trace = attached.forward(seen.tokens_BT, budget=2.5, images=[WIDE]).trace
    assert np.isfinite(np.asarray(trace.importance_BT)).all()


@pytest.mark.slow
def test_fewer_experts_for_pictures_than_for_text(tmp_path, model):
    seen = scene([9, WIDE, 30])
    trace = model.with_policy("static_modality", 3).forward(seen.tokens_BT, images=[WIDE]).trace
    places_T = seen.tokens_BT[0] == IDS["image_token_id"]
    slots_LT = np.asarray(trace.real_slots_BT)[:, 0]
    assert set(slots_LT[:, places_T].ravel()) == {2}
    assert set(slots_LT[:, ~places_T].ravel()) == {3}
    text = np.array([[9, 8, 30]])
    np.testing.assert_array_equal(model.with_policy("static_modality", 3).logits(text), model.logits(text))
    with pytest.raises(UserError, match="dial=8 must be from 1 to 7"):
        model.with_policy("static_modality", 8)
    with pytest.raises(UserError, match="the policy 'top_p' decides already"):
        model.with_policy("top_p", 0.5).logits(text, budget=2)
    with pytest.raises(UserError, match="has no place for the policy 'static'"):
        model.with_policy("static", 2).export(tmp_path / "out")


@pytest.mark.slow
def test_on_a_mesh_and_in_16_bits(folder, model):
    seen = scene([9, WIDE, 30])
    expected_BTY = np.asarray(model.logits(seen.tokens_BT, images=[WIDE]))
    split = load_pretrained(folder, make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2]))
    found_BTY = np.asarray(split.logits(np.repeat(seen.tokens_BT, 2, axis=0), images=[WIDE, WIDE]))
    np.testing.assert_allclose(found_BTY, np.repeat(expected_BTY, 2, axis=0), atol=1e-4)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    stack = dataclasses.replace(model.config.stack, dtype="bfloat16", param_dtype="bfloat16")
    low = dataclasses.replace(model, params=half, config=dataclasses.replace(model.config, stack=stack))
    assert np.isfinite(np.asarray(low.logits(seen.tokens_BT, images=[WIDE]))).all()


def decoded_prompt(model, prompt, **media):
    """Decodes the ids of a prompt, with one letter for each placeholder."""
    letters = {IDS["image_token_id"]: "i", IDS["video_token_id"]: "v"}
    letters |= {IDS["vision_start_token_id"]: "<", IDS["vision_end_token_id"]: ">"}
    return "".join(letters.get(i) or model.tokenizer.pieces([i])[0] for i in model.tokens(prompt, **media))


def test_placeholders_of_pictures_in_a_prompt(model, folder):
    image, rows = str(folder / "cat.png"), "i" * 15  # 21 x 37 pixels are resized to 24 x 40, 3 x 5 squares
    assert decoded_prompt(model, "A cat", images=[image]) == f"<{rows}>A cat"
    asked = [{"role": "user", "content": "cat"}]
    whole = f"<|bos|>user\n<{rows}>cat<|sep|>\n<|bos|>assistant\n"
    assert decoded_prompt(model, asked, images=[PIXELS]) == whole
    parts = [{"type": "image", "image": Image.fromarray(PIXELS)}, {"type": "text", "text": "cat"}]
    assert decoded_prompt(model, [{"role": "user", "content": parts}]) == whole
    parts = [{"type": "text", "text": "cat"}, {"type": "image"}]
    assert f"cat<{rows}><|sep|>" in decoded_prompt(model, [{"role": "user", "content": parts}], images=[PIXELS])


def test_each_frame_of_a_video_follows_its_seconds(model):
    film = Video(np.stack([PIXELS] * 9), fps=4)  # frames 0, 3, 5 and 8 are sampled
    frame = f"<{'v' * 6}>"  # 16 x 24 pixels, 2 x 3 squares
    assert decoded_prompt(model, "A", videos=[film]) == f"<0.4 seconds>{frame}<1.6 seconds>{frame}A"
    assert decoded_prompt(model, [{"role": "user", "content": "cat"}], videos=[film]).count(" seconds><v") == 2


def test_fps_is_for_frames_and_not_for_files():
    with pytest.raises(UserError, match=r"fps=25 of a video in a file: leave it out, the file says it"):
        Video("film.mp4", fps=25)
    for fps in (None, 0, float("nan")):
        with pytest.raises(UserError, match="of a video must be a number > 0"):
            Video(np.zeros((4, 8, 8, 3), np.uint8), fps=fps)


@pytest.mark.slow
def test_generation_with_a_picture(model, folder, capsys):
    image = str(folder / "cat.png")
    answer = model.generate("A cat", max_new_tokens=3, images=[image], budget=2)
    both = model.generate(["A cat", "A"], max_new_tokens=3, images=[[image], []], budget=2)
    assert both[0] == answer
    command = ["generate", str(folder), "--prompt", "A cat", "--image", image, "--max-new-tokens", "3", "--budget", "2"]
    assert main(command) == 0
    assert capsys.readouterr().out.rstrip("\n") == answer.rstrip("\n")


WRONG = [
    ({"images": [WIDE, SMALL]}, "images are given that the tokens have no places for (1 frames)"),
    ({"images": [SMALL]}, "places for more images than are given (1)"),
    ({"images": [patches((1, 8, 8))]}, "row 0 of the tokens has fewer places from 1 on than the 4 x 4 rows"),
    ({"videos": [WIDE]}, "video 0 is of modality image"),
    ({"images": [WIDE._replace(grid=(1, 3, 8))]}, "patches of shape (32, 96); a grid of (1, 3, 8) needs (24, 96)"),
    ({"images": "cat.png"}, "images is a str; give a list"),
    ({"images": ["/no/such.png"]}, "image 0 (/no/such.png)"),
    ({"images": [np.zeros((1, 300, 3), np.uint8)]}, "a side may be at most 200 times the other"),
    ({"videos": [np.zeros((4, 8, 8, 3), np.uint8)]}, "video 0 is a ndarray; give Video(frames, fps), or Video(file)"),
    ({"videos": [Video(np.zeros((1, 8, 8, 3), np.uint8), 2)]}, "video 0 has 1 frames; the model reads 2 at a time"),
]


@pytest.mark.parametrize(("media", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_pictures_that_do_not_fit_are_refused(model, media, message):
    seen = scene([WIDE, 30])
    with pytest.raises(UserError) as error:
        model.logits(seen.tokens_BT, **media)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_parts_of_a_conversation_must_match_the_pictures(model):
    parts = [{"type": "image"}, {"type": "text", "text": "cat"}]
    with pytest.raises(UserError, match="has 1 parts of type 'image', but 0 are given"):
        model.tokens([{"role": "user", "content": parts}])
    with pytest.raises(UserError, match="let all parts say which"):
        model.tokens([{"role": "user", "content": [{"type": "image", "image": PIXELS}]}], images=[PIXELS])
    with pytest.raises(UserError, match="a part of type 'audio'; the model reads text, image and video"):
        model.tokens([{"role": "user", "content": [{"type": "audio"}]}])
    with pytest.raises(UserError, match="images hold 1 lists for 2 prompts"):
        model.generate(["a", "b"], images=[[PIXELS]])


def test_a_text_model_refuses_pictures(tmp_path):
    text = load_pretrained(tiny_checkpoint(tmp_path / "hub", "llama"))
    with pytest.raises(UserError, match="reads text alone, but images are given"):
        text.logits([[1, 2]], images=[PIXELS])


SETTINGS = [
    ({"patch_size": 8}, "patch_size=8, but config.json's vision_config makes it 4"),
    ({"size": {"height": 8}}, "height=8: not supported"),
    ({"image_mean": [0.5]}, "image_mean=[0.5] must be 3 numbers, one a channel"),
    ({"resample": 4}, "resample=4 is not supported"),
    ({"do_center_crop": True}, "do_center_crop=True is not supported, only false"),
    ({"crop_pct": 0.9}, "crop_pct=0.9: not supported"),
    ({"size": {"shortest_edge": 64, "longest_edge": 8}}, "size from 64 to 8 pixels is no range"),
    ({"do_resize": False}, "has 21 x 37 pixels; without do_resize both must be multiples of 8"),
    (None, "holds neither preprocessor_config.json nor a processor_config.json with image_processor"),
]


@pytest.mark.parametrize(("changes", "message"), SETTINGS, ids=[message[:40] for _, message in SETTINGS])
def test_unsupported_settings_are_refused_by_name(tmp_path, model, changes, message):
    if changes is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **changes}))
    with pytest.raises(UserError) as error:
        dataclasses.replace(model, path=tmp_path).show([PIXELS])
    assert message in str(error.value)


def test_pictures_and_videos_may_share_a_settings_file(tmp_path, model):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PREPROCESSOR}))
    (item,) = dataclasses.replace(model, path=tmp_path).show([PIXELS]).items
    assert item.grid == (1, 6, 10)
    np.testing.assert_array_equal(item.patches_NX, model.show([PIXELS]).items[0].patches_NX)

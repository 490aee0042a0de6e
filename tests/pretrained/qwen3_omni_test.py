"""Qwen3-Omni's thinker: reading and writing, sounds in prompts, and what is refused."""

import base64
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.io import wavfile

from anyexperts_jax import load_pretrained
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.core.registries import FAMILIES
from anyexperts_jax.pretrained.budget import BudgetInForce
from anyexperts_jax.pretrained.decode import Request, decode
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.pictures import Video, listed
from anyexperts_jax.pretrained.placing import place
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.tokenizers.train import train_tokenizer
from pretrained.tiny_hub import random_tensors, tensors_in, tiny_checkpoint, write_checkpoint
from pretrained.tiny_omni import IDS, MARKS, TEMPLATE, omni_checkpoint, omni_values, rows_of, scene, sound
from pretrained.tiny_vl import patches

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

SAMPLES = np.sin(np.arange(5000) / 9).astype(np.float32)  # 31 frames, 4 rows
PIXELS = np.random.default_rng(0).integers(0, 256, (21, 37, 3), np.uint8)
SPEECH = {"talker.model.norm.weight": np.ones(3, np.float32), "code2wav.decoder.0.bias": np.ones(2, np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = omni_checkpoint(tmp_path_factory.mktemp("hub") / "whole", more=SPEECH, enable_audio_output=True)
    train_tokenizer(["Hello world", "cat on the mat; the cat", "A cat sat"], 300, special=MARKS).save(made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    wavfile.write(made / "talk.wav", 16000, (SAMPLES * 32767).astype(np.int16))
    return made


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder)


@pytest.mark.parametrize("alone", [False, True])
def test_an_export_equals_the_checkpoint_bit_for_bit(tmp_path, alone):
    first = omni_checkpoint(tmp_path / "hub", alone=alone, more=None if alone else SPEECH)
    model = load_pretrained(first)
    model.export(tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    read, written = tensors_in(first), tensors_in(tmp_path / "out")
    assert read.keys() - written.keys() == (set() if alone else set(SPEECH))
    for name, value in written.items():
        np.testing.assert_array_equal(value, read[name], err_msg=name)
    assert again.config == model.config


def test_an_export_turns_audio_output_off(tmp_path, model):
    model.export(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["enable_audio_output"] is False
    text = values["thinker_config"]["text_config"]
    assert text["rope_parameters"]["rope_theta"] == text["rope_theta"] == 5000.0
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_ignored_tensors_are_counted(folder, capsys):
    assert main(["import", str(folder), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "2 tensors are left out, which this model does not use here: 1 of code2wav, 1 of talker" in told
    assert "a vision tower of 3 layers, width 24; an audio tower of 2 layers, width 12" in told


CONFIGS = [
    ({"audio": {"activation_function": "relu"}}, "audio_config: activation_function='relu' is not supported"),
    ({"audio": {"scale_embedding": True}}, "audio_config: scale_embedding=True is not supported"),
    ({"audio": {"output_dim": 24}}, "output_dim=24 is not the decoder's hidden_size=28"),
    ({"audio": {"n_window_infer": 99}}, "n_window_infer=99 must be at least 2 * n_window=100"),
    ({"audio": {"max_source_positions": 12}}, "max_source_positions=12 is below the 13 rows of 100 frames"),
    ({"audio": {"encoder_attention_heads": 5}}, "audio_tower.d_model=12 must be a multiple of num_heads=5"),
    ({"audio": {"num_mel_bins": 20}}, "audio_tower.conv_out.weight is [12, 12], config.json wants [12, 18]"),
    ({"audio": {"position_buckets": 4}}, "audio_config: position_buckets=4: not supported by this family"),
    ({"audio": {"encoder_layers": 1}}, "that nothing reads: thinker.audio_tower.layers.1."),
    ({"text": {"shared_expert_intermediate_size": 8}}, "shared_expert_intermediate_size=8 is not supported"),
    ({"text": {"rope_theta": None}}, "text_config: rope_theta is nowhere"),
    ({"vision": {"in_chans": 4}}, "vision_config: in_chans=4 is not supported, only 3"),
    ({"vision": {"apply_vit_abs_pos_embed": False}}, "apply_vit_abs_pos_embed=False is not supported"),
    ({"thinker": {"audio_config": None}}, "thinker_config has no audio_config"),
    ({"talker": 3}, "talker=3: not supported by this family"),
    ({"thinker_config": None}, "has no thinker_config"),
]


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(omni_values(audio={"num_mel_bins": 16}))


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[message[:40] for _, message in CONFIGS])
def test_an_unsupported_config_is_refused_by_name(tmp_path, tensors, changes, message):
    changes = {**changes, "audio": {"num_mel_bins": 16, **changes.get("audio", {})}}
    write_checkpoint(tmp_path / "hub", omni_values(**changes), tensors)
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "hub")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_keys_of_the_release_are_known():
    """The release has keys that transformers' class does not read, and lacks num_position_embeddings."""
    rope = {"interleaved": True, "mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"}
    text = {"use_qk_norm": True, "shared_expert_intermediate_size": 0, "use_sliding_window": False}
    vision = {"in_chans": 3, "spatial_patch_size": 4, "image_size": 768, "tokens_per_second": 2}
    values = omni_values(
        text={**text, "rope_scaling": {**rope, "type": "default"}},
        vision={**vision, "apply_vit_abs_pos_embed": True, "num_position_embeddings": None},
        audio={"num_hidden_layers": 2, "conv_chunksize": 500, "dropout": 0, "tie_word_embeddings": True},
        thinker={"seconds_per_chunk": 2, "user_token_id": 872, "dtype": "bfloat16", "initializer_range": 0.02},
        talker_config={"num_code_groups": 16},
        code2wav_config={"num_quantizers": 16},
        im_end_token_id=11,
    )
    config = FAMILIES["qwen3_omni_moe"].config(HubConfig(values, "config.json"))
    assert config.vision_tower.side == 48
    assert (config.audio_tower.chunk_frames, config.audio_tower.window_chunks) == (100, 2)


@pytest.mark.slow
def test_on_a_mesh_and_in_16_bits(folder, model):
    seen = scene([19, sound(130), 30])
    expected_BTY = np.asarray(model.logits(seen.tokens_BT, **seen.media))
    split = load_pretrained(folder, make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2]))
    found_BTY = np.asarray(split.logits(np.repeat(seen.tokens_BT, 2, axis=0), audios=[*seen.audios, *seen.audios]))
    np.testing.assert_allclose(found_BTY, np.repeat(expected_BTY, 2, axis=0), atol=1e-4)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    stack = dataclasses.replace(model.config.stack, dtype="bfloat16", param_dtype="bfloat16")
    low = dataclasses.replace(model, params=half, config=dataclasses.replace(model.config, stack=stack))
    assert np.isfinite(np.asarray(low.logits(seen.tokens_BT, **seen.media))).all()


def test_positions_of_sounds_and_videos(model):
    film = patches((3, 4, 6), Modality.VIDEO)._replace(pair_seconds=0.5)
    seen = scene([19, sound(30), film, 31], [20])
    placed = place(model.show(**seen.media), seen.tokens_BT, seen.valid_BT)
    rotary_T3 = np.asarray(placed.media.rotary_BT3)[0]
    assert rotary_T3[:8].tolist() == [[t] * 3 for t in range(8)]  # text, start, four rows, end, start
    places = [[8 + 6.5 * pair, 8 + row, 8 + column] for pair in range(3) for row in range(2) for column in range(3)]
    assert rotary_T3[8:26].tolist() == places
    assert rotary_T3[26:].tolist() == [[22 + t] * 3 for t in range(2)]
    assert np.asarray(placed.lead_B).tolist() == [28 - 24, 0]
    modality_T = np.asarray(placed.media.modality_BT)[0]
    assert modality_T.tolist() == [0, 0, *[Modality.AUDIO] * 4, 0, 0, *[Modality.VIDEO] * 18, 0, 0]


@pytest.mark.slow
def test_a_sound_affects_only_later_tokens_of_its_row(model):
    """Also in a batch with a longer sound, where transformers' convolutions read past the end of the shorter one."""
    short, long = sound(61), sound(130, 1)
    seen = scene([19, 18, short, 30], [long, 19])
    logits_BTY = np.asarray(model.logits(seen.tokens_BT, seen.valid_BT, audios=[short, long]))
    others_BTY = np.asarray(model.logits(seen.tokens_BT, seen.valid_BT, audios=[sound(61, 2), long]))
    np.testing.assert_array_equal(logits_BTY[0, :3], others_BTY[0, :3])
    assert np.abs(logits_BTY[0, 3:13] - others_BTY[0, 3:13]).max() > 1e-3
    np.testing.assert_array_equal(logits_BTY[1], others_BTY[1])
    alone = scene([19, 18, short, 30])
    alone_BTY = np.asarray(model.logits(alone.tokens_BT, audios=[short]))
    np.testing.assert_allclose(alone_BTY[0], logits_BTY[0, : alone_BTY.shape[1]], atol=1e-5)


@pytest.mark.slow
def test_greedy_tokens_equal_those_of_full_forward_passes(model):
    """After a sound and a video, where positions are not whole numbers."""
    film = patches((2, 4, 2), Modality.VIDEO)._replace(pair_seconds=2.1 / 13)
    seen = scene([19, sound(30), film, 30], [11, sound(17, 1)])
    prompts = [own[valid].tolist() for own, valid in zip(seen.tokens_BT, seen.valid_BT, strict=True)]
    found = decode(
        model.weights, prompts, Request(3), BudgetInForce(), lambda row, token: True, shown=model.show(**seen.media)
    ).tokens
    longest = max(map(len, prompts)) + 3
    texts = [list(prompt) for prompt in prompts]
    for _ in range(3):  # rows of constant length, so that one program is compiled
        tokens_BT = np.array([text + [0] * (longest - len(text)) for text in texts])
        valid_BT = np.array([[t < len(text) for t in range(longest)] for text in texts])
        logits_BTY = np.asarray(model.logits(tokens_BT, valid_BT, **seen.media))
        for row, text in enumerate(texts):
            text.append(int(logits_BTY[row, len(text) - 1].argmax()))
    assert found == [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def decoded_prompt(model, prompt, **media):
    """Decodes the ids of a prompt, with one letter for each placeholder."""
    letters = {IDS["image_token_id"]: "i", IDS["video_token_id"]: "v", IDS["audio_token_id"]: "a"}
    letters |= {IDS["vision_start_token_id"]: "<", IDS["vision_end_token_id"]: ">"}
    letters |= {IDS["audio_start_token_id"]: "(", IDS["audio_end_token_id"]: ")"}
    return "".join(letters.get(i) or model.tokenizer.pieces([i])[0] for i in model.tokens(prompt, **media))


def test_placeholders_of_sounds_in_a_prompt(model, folder):
    path = folder / "talk.wav"
    assert decoded_prompt(model, "A cat", audios=[str(path)]) == "(aaaa)A cat"
    both = decoded_prompt(model, "A cat", audios=[SAMPLES], images=[PIXELS])
    assert both == f"<{'i' * 15}>(aaaa)A cat"
    whole = "<|bos|>user\n(aaaa)cat<|sep|>\n<|bos|>assistant\n"
    assert decoded_prompt(model, [{"role": "user", "content": "cat"}], audios=[SAMPLES]) == whole
    text, data = {"type": "text", "text": "cat"}, base64.b64encode(path.read_bytes()).decode()
    for part, given in (
        ({"type": "audio", "audio": str(path)}, []),
        ({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, []),
        ({"type": "audio"}, [SAMPLES]),
    ):
        assert decoded_prompt(model, [{"role": "user", "content": [part, text]}], audios=given) == whole
    parts = [text, {"type": "audio"}, {"type": "image"}]
    mixed = decoded_prompt(model, [{"role": "user", "content": parts}], audios=[SAMPLES], images=[PIXELS])
    assert f"cat(aaaa)<{'i' * 15}><|sep|>" in mixed


def test_the_placeholders_of_a_video_have_no_seconds_between_them(model, folder):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"size": {"shortest_edge": 64, "longest_edge": 512}}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    film = Video(np.stack([PIXELS] * 9), fps=4)  # frames 0, 2, 4 and 6 are sampled
    (item,) = model.show(videos=[film]).items
    assert item.grid == (2, 4, 6)  # each frame has at most 512 pixels
    assert item.pair_seconds == pytest.approx(2 * 9 / 4 / 4)
    assert decoded_prompt(model, "A", videos=[film]) == f"<{'v' * 12}>A"


@pytest.mark.slow
def test_generation_with_a_sound_and_a_video(model, folder, capsys):
    from PIL import Image

    pictures = [Image.fromarray(PIXELS + np.uint8(10 * i)) for i in range(4)]
    pictures[0].save(folder / "film.gif", save_all=True, append_images=pictures[1:], duration=250)
    paths = {"audio": str(folder / "talk.wav"), "video": str(folder / "film.gif")}
    media = {"audios": [paths["audio"]], "videos": [Video(paths["video"])]}
    answer = model.generate("A cat", max_new_tokens=2, budget=2, **media)
    options = [word for kind, path in paths.items() for word in (f"--{kind}", path)]
    command = ["generate", str(folder), "--prompt", "A cat", *options, "--max-new-tokens", "2", "--budget", "2"]
    assert main(command) == 0
    assert capsys.readouterr().out.rstrip("\n") == answer.rstrip("\n")


WRONG = [
    ({"audios": [sound(20), sound(20)]}, "audios are given that the tokens have no places for (1 sounds)"),
    ({"images": [PIXELS]}, "places for more audios than are given (0)"),
    ({"audios": [sound(40)]}, "row 0 of the tokens has fewer places from 1 on than the 5 rows that its audio needs"),
    ({"audios": "talk.wav"}, "audios is a str; give a list"),
    ({"audios": ["/no/such.wav"]}, "/no/such.wav"),
    ({"audios": [SAMPLES[:200]]}, "sound 0 has 200 samples; the model needs 201 at least"),
    ({"audios": [SAMPLES[None]]}, "sound 0: audio of shape (1, 5000) must be mono"),
    ({"audios": [sound(20)._replace(mel_SX=np.zeros((20, 9), np.float32))]}, "frames of shape (20, 9); need [S, 10]"),
]


@pytest.mark.parametrize(("media", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_sounds_that_do_not_fit_are_refused(model, media, message):
    seen = scene([sound(20), 30])
    with pytest.raises(UserError) as error:
        model.logits(seen.tokens_BT, **media)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_samples_without_a_list_are_refused():
    with pytest.raises(UserError, match="audios is a ndarray; give a list"):
        listed("audios", SAMPLES)


def test_sound_inside_a_video_is_refused(model):
    film = patches((1, 4, 6), Modality.VIDEO)
    seen = scene([film, sound(10), 30])
    ids = seen.tokens_BT.copy()
    ids[0, 3] = IDS["audio_token_id"]
    with pytest.raises(UserError, match="has sound inside a video, which is not read; give it as a sound of its own"):
        model.logits(ids, **seen.media)


def test_parts_of_a_conversation(model):
    for part, message in (
        ({"type": "input_audio", "input_audio": "x"}, "message 0: input_audio must be an object with data in base64"),
        ({"type": "input_audio", "input_audio": {"data": "???"}}, "message 0: the data of input_audio is not base64"),
        ({"type": "sound"}, "a part of type 'sound'; the model reads text, image, video and audio"),
        ({"type": "audio"}, "has 1 parts of type 'audio', but 0 are given"),
    ):
        with pytest.raises(UserError, match=message):
            model.tokens([{"role": "user", "content": [part]}])


def test_a_model_without_an_audio_tower_refuses_sounds(tmp_path, capsys):
    from pretrained.tiny_vl import vl_checkpoint

    sees = vl_checkpoint(tmp_path / "vl")
    with pytest.raises(UserError, match="hears no sound, but audios are given"):
        load_pretrained(sees).logits([[1, 2]], audios=[SAMPLES])
    assert main(["generate", str(sees), "--prompt", "a", "--audio", "talk.wav"]) == 2
    assert f"--audio: the model in {sees} reads text, image, video alone" in capsys.readouterr().err
    reads = tiny_checkpoint(tmp_path / "text", "llama")
    assert main(["generate", str(reads), "--prompt", "a", "--video", "film.mp4"]) == 2
    assert f"--video: the model in {reads} reads text alone" in capsys.readouterr().err


def test_number_of_rows_of_a_sound(model):
    shown = model.show(audios=[sound(1)])
    for frames in (1, 8, 9, 99, 100, 101, 237, 400):
        assert shown.sound_rows(sound(frames)) == rows_of(frames)
    assert dataclasses.replace(shown.audio, chunk_frames=16).chunk_rows == 2


def test_a_sound_may_be_given_as_bytes(model, folder):
    data = io.BytesIO((folder / "talk.wav").read_bytes()).getvalue()
    (of_bytes,), (of_path,) = (model.show(audios=[own]).items for own in (data, folder / "talk.wav"))
    np.testing.assert_array_equal(of_bytes.mel_SX, of_path.mel_SX)
    assert of_bytes.mel_SX.shape == (31, 10)

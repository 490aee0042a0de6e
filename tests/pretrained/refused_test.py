"""Checkpoints with faults are refused in one line, before any weight is read."""

import json

import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.registries import FAMILIES
from pretrained.tiny_hub import hub_values, random_tensors, tiny_checkpoint, write_checkpoint

pytest.importorskip("safetensors")

CONFIGS = [
    ({"rope_theta": None}, "rope_theta is nowhere"),
    ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_parameters.rope_theta=10000.0, rope_theta=5000.0 disagree"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope type 'llama3' needs original_max_position"),
    ({"architectures": ["GPT2LMHeadModel"]}, "class GPT2LMHeadModel is not supported, only LlamaForCausalLM"),
    ({"architectures": None}, "architectures=None must name one class"),
    ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised (fp8)"),
    ({"hidden_size": None}, "has no hidden_size"),
    ({"hidden_size": "28"}, "hidden_size='28' must be a whole number"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ({"num_experts": 7, "num_local_experts": 8}, "num_experts=7, num_local_experts=8 disagree"),
    ({"num_experts": None}, "says nowhere how many experts there are"),
    ({"num_experts": 8}, "missing: model.layers.0.mlp.experts.7.gate_proj.weight"),
    ({"num_experts": 6}, "that nothing reads: model.layers.0.mlp.experts.6."),
    ({"mlp_only_layers": [1]}, "layers 0, 2 of 3 have experts"),
    ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8 is below max_position_embeddings=96"),
    ({"intermediate_size": None, "moe_intermediate_size": 16}, "is [12, 28], config.json wants [16, 28]"),
    ({"head_dim": 8}, "self_attn.o_proj.weight is [28, 40], config.json wants [28, 32]"),
    ({"tie_word_embeddings": True}, "config.json ties the head to model.embed_tokens.weight"),
    ({"num_hidden_layers": 4}, "missing: model.layers.3.input_layernorm.weight"),
]


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(hub_values("qwen3_moe"))


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[message[:30] for _, message in CONFIGS])
def test_a_config_that_does_not_fit_is_refused(tmp_path, tensors, changes, message):
    values = {**hub_values("qwen3_moe"), **changes}
    write_checkpoint(tmp_path / "hub", values, tensors)
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "hub")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_message_lists_every_class(tmp_path, tensors):
    write_checkpoint(tmp_path / "hub", hub_values("qwen3_moe", architectures=["NoSuchModel"]), tensors)
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "hub")
    assert all(cls in str(error.value) for name in FAMILIES for cls in FAMILIES[name].architectures)


def break_index(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncate(folder):
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def garble_config(folder):
    (folder / "config.json").write_text("{")


def drop_config(folder):
    (folder / "config.json").unlink()


def drop_weights(folder):
    for path in folder.glob("*model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def point_outside(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../secret.safetensors")
    path.write_text(json.dumps(index))


FILES = [
    (break_index, "lacks 1 of the 2 files"),
    (truncate, "model-00001-of-00002.safetensors cannot be read"),
    (garble_config, "not valid JSON"),
    (drop_config, "holds no config.json"),
    (drop_weights, "pytorch_model.bin cannot be read, save the model as safetensors"),
    (point_outside, "names a file outside its folder"),
]


@pytest.mark.parametrize(("damage", "message"), FILES, ids=[damage.__name__ for damage, _ in FILES])
def test_missing_and_damaged_files_are_refused(tmp_path, damage, message):
    folder = tiny_checkpoint(tmp_path / "hub", "llama", files=2)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


def test_a_type_that_is_not_read_is_named(tmp_path):
    values = hub_values("llama")
    tensors = random_tensors(values)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    write_checkpoint(tmp_path / "hub", values, tensors)
    with pytest.raises(UserError, match=r"tensor model.norm.weight is I8"):
        load_pretrained(tmp_path / "hub")


def test_without_a_tokenizer_only_logits_work(tmp_path):
    model = load_pretrained(tiny_checkpoint(tmp_path / "hub", "llama"))
    assert model.logits([[1, 2, 3]]).shape == (1, 3, 53)
    with pytest.raises(UserError, match="there is no tokenizer"):
        model.generate("a")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 53]], "tokens_BT holds"),
        ([1, 2], r"tokens_BT has shape \(2,\)"),
        ([[]], r"tokens_BT has shape \(1, 0\)"),
        ([[0.5]], "tokens_BT is float32"),
        ([[1], [2, 3]], "tokens_BT is no array"),
    ],
)
def test_unknown_token_ids_are_refused(tmp_path, tokens, message):
    model = load_pretrained(tiny_checkpoint(tmp_path / "hub", "llama"))
    with pytest.raises(UserError, match=message):
        model.logits(tokens)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    model = load_pretrained(tiny_checkpoint(tmp_path / "hub", "llama"))

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        model.export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_an_export_makes_the_folders_it_lies_in(tmp_path):
    """`make pretrained` on a fresh clone writes to runs/pretrained/split, where there is no runs yet."""
    model = load_pretrained(tiny_checkpoint(tmp_path / "hub", "llama"))
    model.export(tmp_path / "runs/pretrained/split")
    assert (tmp_path / "runs/pretrained/split/config.json").is_file()
    with pytest.raises(UserError, match=r"cannot be made: .*config.json is no folder"):
        model.export(tmp_path / "hub/config.json/out")


def test_an_export_does_not_overwrite_a_folder(tmp_path):
    model = load_pretrained(tiny_checkpoint(tmp_path / "hub", "llama"))
    with pytest.raises(UserError, match="exists; name a new folder"):
        model.export(tmp_path / "hub")
    with pytest.raises(UserError, match="form='zip' is unknown; valid: hub"):
        model.export(tmp_path / "out", form="zip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--image", "cat.png"], "the model in {hub} reads text alone"),
        (["--question", "a"], "{hub} is a published checkpoint; give --prompt"),
        ([], "{hub} is a published checkpoint; give --prompt"),
    ],
)
def test_options_that_do_not_apply_to_a_checkpoint_are_refused(tmp_path, capsys, options, message):
    folder = tiny_checkpoint(tmp_path / "hub", "llama")
    assert main(["generate", str(folder), *options]) == 2
    assert message.format(hub=folder) in capsys.readouterr().err

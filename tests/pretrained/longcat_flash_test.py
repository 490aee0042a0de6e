"""LongCat-Flash, one MoE block of it and the whole: equal to transformers', and refused if it does not fit."""

import json

import numpy as np
import pytest

from anyexperts_jax import MoE, load_pretrained
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.pretrained.budget import BudgetInForce
from anyexperts_jax.pretrained.decode import Request, decode
from anyexperts_jax.pretrained.longcat_flash import load_mixture
from pretrained.tiny_hub import random_tensors, tensors_in, write_checkpoint
from pretrained.torch_routing import logits_and_choices

pytest.importorskip("safetensors")
D, F, E, ZERO = 16, 12, 5, 3
VALUES = {
    "architectures": ["LongcatFlashForCausalLM"],
    "hidden_size": D,
    "expert_ffn_hidden_size": F,
    "n_routed_experts": E,
    "zero_expert_num": ZERO,
    "zero_expert_type": "identity",
    "moe_topk": 3,
    "num_layers": 2,
    "routed_scaling_factor": 6.0,
}


def tensors(layer=1):
    rng, prefix = np.random.default_rng(0), f"model.layers.{layer}.mlp."
    shapes = {"router.classifier.weight": (E + ZERO, D), "router.e_score_correction_bias": (E + ZERO,)}
    for e in range(E + ZERO):
        for name in ("gate_proj", "up_proj", *(("down_proj",) if e < E else ())):
            shapes[f"experts.{e}.{name}.weight"] = (D, F) if name == "down_proj" else (F, D)
    other = {"model.layers.1.mlps.0.gate_proj.weight": (24, D)}  # a dense FFN beside the MoE block
    named = {**{prefix + name: shape for name, shape in shapes.items()}, **other}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in named.items()}


def test_a_layer_is_read(tmp_path):
    found = load_mixture(write_checkpoint(tmp_path / "hub", VALUES, tensors()), 1)
    own = tensors()
    np.testing.assert_array_equal(
        found.params["router"]["kernel"], own["model.layers.1.mlp.router.classifier.weight"].T
    )
    np.testing.assert_array_equal(
        found.params["experts"]["w_down_EFD"][4], own["model.layers.1.mlp.experts.4.down_proj.weight"].T
    )
    assert found.params["experts"]["w_up_EDF"].shape == (E, D, F)
    switches = found.config.switches
    assert (found.config.scaling_factor, found.config.k_max, found.config.num_virtual) == (6.0, 3, ZERO)
    assert (switches.virtual_output, switches.cap_rounding, switches.normalisation) == ("identity", "off", "none")


@pytest.mark.parametrize(
    ("changes", "missing", "layer", "message"),
    [
        ({"zero_expert_type": "copy"}, None, 1, "zero_expert_type='copy' is not supported"),
        ({"router_bias": True}, None, 1, "router_bias=True is not supported"),
        ({"architectures": ["LlamaForCausalLM"]}, None, 1, "must be"),
        ({"n_routed_experts": 6, "zero_expert_num": 2}, None, 1, "experts.5.down_proj.weight"),
        ({}, "experts.3.up_proj.weight", 1, "experts.3.up_proj.weight"),
        ({}, None, 2, "layer 2 is not among its 2"),
        ({}, None, 0, "do not fit config.json: model.layers.0.mlp"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(tmp_path, changes, missing, layer, message):
    own = {name: value for name, value in tensors().items() if missing is None or not name.endswith(missing)}
    folder = write_checkpoint(tmp_path / "hub", {**VALUES, **changes}, own)
    with pytest.raises(UserError, match=message) as error:
        load_mixture(folder, layer)
    assert "\n" not in str(error.value)


WHOLE = {
    **VALUES,
    "vocab_size": 53,
    "hidden_size": 28,
    "num_attention_heads": 4,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "head_dim": 6,
    "v_head_dim": 10,
    "ffn_hidden_size": 20,
    "max_position_embeddings": 96,
    "rms_norm_eps": 0.01,
    "rope_theta": 5000.0,
    "model_type": "longcat_flash",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "bos_token_id": 0,
    "eos_token_id": 52,
    "pad_token_id": 51,
}


def whole(folder, seed=0, **changes):
    """A whole model of random weights, with the unused matrices of its zero experts and a further head."""
    values = {**WHOLE, **changes}
    random, own = np.random.default_rng(seed), random_tensors(values, seed=seed)
    for name in own:
        if name.endswith("e_score_correction_bias"):
            own[name] = 0.05 * own[name]  # scores are of this size: both decide
    for layer in range(values["num_layers"]):
        for e in range(E, E + values["zero_expert_num"]):
            for name in ("gate_proj", "up_proj"):
                shape = (F, values["hidden_size"])
                full = f"model.layers.{layer}.mlp.experts.{e}.{name}.weight"
                own[full] = random.normal(size=shape).astype("float32")
    return write_checkpoint(folder, values, {**own, "model.mtp.norm.weight": np.ones(4, np.float32)})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_pretrained(whole(tmp_path_factory.mktemp("hub") / "whole"))


def test_the_whole_model_is_read_and_written_bit_for_bit(model, tmp_path):
    read = tensors_in(model.path)
    model.export(tmp_path / "out")
    written = tensors_in(tmp_path / "out")
    unused = {name for name in read if ".mlp.experts." in name and int(name.split(".")[5]) >= E}
    assert len(unused) == 2 * ZERO * 2
    unused.add("model.mtp.norm.weight")
    assert written.keys() == read.keys() - unused
    for name, value in written.items():
        np.testing.assert_array_equal(value, read[name], err_msg=name)
    assert load_pretrained(tmp_path / "out").config == model.config
    stack = model.config.stack
    assert (stack.num_layers, stack.num_moe_layers, stack.shortcut) == (4, 2, True)
    assert stack.attention.latent.latent_factor == pytest.approx((28 / 14) ** 0.5)
    assert model.config.moe.num_virtual == ZERO


@pytest.mark.slow
def test_greedy_tokens_are_those_of_whole_forward_passes(model):
    prompts, count = [[3, 1, 4, 1, 5], [9, 2]], 5
    found = decode(model.weights, prompts, Request(count), BudgetInForce(), lambda row, token: True)
    longest, texts, real = max(map(len, prompts)) + count, [list(prompt) for prompt in prompts], []
    for _ in range(count):
        tokens_BT = np.array([text + [0] * (longest - len(text)) for text in texts])
        valid_BT = np.array([[t < len(text) for t in range(longest)] for text in texts])
        output = model.forward(tokens_BT, valid_BT)
        real.append(np.asarray(output.trace.real_slots_BT)[:, valid_BT].mean())
        for row, text in enumerate(texts):
            text.append(int(np.asarray(output.logits_BTY)[row, len(text) - 1].argmax()))
    assert found.tokens == [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    assert found.real_experts == pytest.approx(real[-1], abs=1e-5)  # zero experts take a share


def test_nothing_depends_on_later_tokens(model):
    tokens_BT = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    changed_BT = np.where(np.arange(8)[None] < 5, tokens_BT, 7)
    before, after = (np.asarray(model.logits(own))[:, :5] for own in (tokens_BT, changed_BT))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mla_scale_q_lora": False}, "mla_scale_q_lora=False is not supported, only true"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3 is not supported"),
        ({"zero_expert_type": "copy"}, "zero_expert_type='copy' is not supported"),
        ({"qk_head_dim": 9}, "qk_head_dim=9 is not supported"),
        ({"ffn_hidden_size": 22}, r"mlps.0.gate_proj.weight is \[20, 28\], config.json wants \[22, 28\]"),
    ],
)
def test_what_does_not_fit_the_whole_is_one_line(tmp_path, changes, message):
    folder = whole(tmp_path / "hub")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


@pytest.mark.slow
def test_its_own_form_is_itself(model, tmp_path):
    model.export(tmp_path / "out", form="longcat")
    assert load_pretrained(tmp_path / "out").config == model.config


@pytest.mark.parity
@pytest.mark.parametrize(("seed", "changes"), [(0, {}), (3, {"attention_bias": True, "num_layers": 3})])
def test_the_whole_model_is_transformers(tmp_path, seed, changes):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = whole(tmp_path / "hub", seed, **changes)
    model = load_pretrained(folder)
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(own).__name__ == "LongcatFlashForCausalLM"
    lengths = np.array([[23], [11], [1]])
    tokens_BT, valid_BT = np.random.default_rng(seed).integers(0, 51, (3, 23)), np.arange(23) < lengths
    inputs = {"attention_mask": torch.tensor(valid_BT).long()}
    expected_BTY, chosen = logits_and_choices(own, tokens_BT, inputs, "TopkRouter")
    output = model.forward(tokens_BT, valid_BT)
    np.testing.assert_allclose(np.asarray(output.logits_BTY)[valid_BT], expected_BTY[valid_BT], rtol=1e-4, atol=1e-4)
    assert len(chosen) == model.config.stack.num_moe_layers
    for ours_BTK, their_BTK in zip(np.asarray(output.trace.expert_ids_BTK), chosen, strict=True):
        np.testing.assert_array_equal(np.sort(ours_BTK[valid_BT]), np.sort(np.minimum(their_BTK, E)[valid_BT]))
    prompt = [3, 1, 4, 1, 5, 9]
    found = decode(model.weights, [prompt], Request(32), BudgetInForce(), lambda row, token: True)
    with torch.no_grad():
        ids = own.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert found.tokens[0] == ids[0, len(prompt) :].tolist()


@pytest.mark.parity
def test_a_layer_equals_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "q_lora_rank": 6, "kv_lora_rank": 6, "qk_nope_head_dim": 4}
    heads |= {"qk_rope_head_dim": 4, "v_head_dim": 4, "head_dim": 4}
    sizes = {key: value for key, value in VALUES.items() if key not in ("architectures", "zero_expert_type")}
    config = transformers.LongcatFlashConfig(**sizes, **heads, vocab_size=40, ffn_hidden_size=20)
    theirs = transformers.LongcatFlashForCausalLM(config).eval()
    layer = theirs.model.layers[1].mlp
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
        layer.router.e_score_correction_bias.normal_(std=0.05)
    theirs.save_pretrained(tmp_path / "hub")
    saved = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert saved["architectures"] == VALUES["architectures"]
    found = load_mixture(tmp_path / "hub", 1)
    x_BTD = np.random.default_rng(1).normal(size=(2, 30, D)).astype(np.float32)
    y_BTD, trace = MoE(found.config, found.d_ff).apply({"params": found.params}, x_BTD, bias_C=found.bias_C)
    with torch.no_grad():
        expected_BTD = layer(torch.tensor(x_BTD)).numpy()
    np.testing.assert_allclose(y_BTD, expected_BTD, atol=2e-5)
    assert len(np.unique(trace.real_slots_BT)) > 1

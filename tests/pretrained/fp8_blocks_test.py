"""Checkpoints of 8-bit blocks: what is read is what their scales say, to the bit."""

import json

import ml_dtypes
import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import named_leaves
from anyexperts_jax.pretrained.fp8_blocks import dequantised
from pretrained.tiny_hub import BFLOAT16, hub_values, random_tensors, tensors_in, write_checkpoint

pytest.importorskip("safetensors")
BLOCK = (16, 12)  # which the widths of 28, 40 and 20 do not fill
SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


def quantised(value):
    """(8-bit numbers, scales) of a matrix, block by block."""
    rows, columns = (-(-size // step) for size, step in zip(value.shape, BLOCK, strict=True))
    small = np.zeros(value.shape, ml_dtypes.float8_e4m3fn)
    scale = np.zeros((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            part = np.s_[i * BLOCK[0] : (i + 1) * BLOCK[0], j * BLOCK[1] : (j + 1) * BLOCK[1]]
            scale[i, j] = np.abs(value[part]).max() / 448
            small[part] = (value[part] / scale[i, j]).astype(small.dtype)
    return small, scale


def plain(small, scale):
    """The definition, a number at a time."""
    found = np.zeros(small.shape, np.float32)
    for i, j in np.ndindex(small.shape):
        found[i, j] = np.float32(small[i, j]) * scale[i // BLOCK[0], j // BLOCK[1]]
    return found.astype(BFLOAT16)


def is_quantised(name):
    return "_proj." in name


@pytest.fixture(scope="module")
def both():
    """The tensors of a model, quantised and as they should be read."""
    values = hub_values("qwen3_moe", num_hidden_layers=2, num_experts=3)
    stored, wanted = {}, {}
    for name, value in random_tensors(values).items():
        if is_quantised(name):
            stored[name], stored[f"{name}_scale_inv"] = quantised(value)
            wanted[name] = plain(stored[name], stored[f"{name}_scale_inv"])
        else:
            stored[name] = wanted[name] = value.astype(BFLOAT16)
    return {**values, "quantization_config": SETTINGS}, values, stored, wanted


def test_it_is_read_as_its_scales_say(tmp_path, both):
    quantised_values, values, stored, wanted = both
    found = load_pretrained(write_checkpoint(tmp_path / "fp8", quantised_values, stored, files=2))
    same = load_pretrained(write_checkpoint(tmp_path / "plain", values, wanted))
    ours, theirs = named_leaves(found.params), named_leaves(same.params)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), err_msg=name)
    assert found.config == same.config
    assert found.config.stack.dtype == "bfloat16"


def test_what_is_written_is_no_longer_quantised(tmp_path, both):
    values, _, stored, wanted = both
    load_pretrained(write_checkpoint(tmp_path / "fp8", values, stored)).export(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = tensors_in(tmp_path / "out")
    assert written.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_stacks_of_matrices():
    """As the experts of Qwen3-VL are stored."""
    random = np.random.default_rng(0)
    each = [quantised(random.standard_normal((28, 20)).astype(np.float32)) for _ in range(3)]
    small, scale = (np.stack(part) for part in zip(*each, strict=True))
    np.testing.assert_array_equal(dequantised(small, scale, BLOCK), np.stack([plain(*one) for one in each]))


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{Q}_scale_inv"), f"1 8-bit tensors have no scales: {Q}"),
        (
            lambda tensors: tensors.update({f"{Q}_scale_inv": np.ones((2, 3), np.float32)}),
            rf"{Q}_scale_inv is \[2, 3\], blocks of 16 x 12 want \[3, 3\]",
        ),
        (
            lambda tensors: tensors.update({Q: tensors[Q].astype(BFLOAT16)}),
            f"1 that nothing reads: {Q}_scale_inv",
        ),
    ],
)
def test_scales_that_do_not_fit_are_named(tmp_path, both, change, message):
    tensors = dict(both[2])
    change(tensors)
    with pytest.raises(UserError, match=message):
        load_pretrained(write_checkpoint(tmp_path / "fp8", both[0], tensors))


@pytest.mark.parametrize(
    "changed",
    [
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"fmt": "e5m2"},
        {"activation_scheme": "static"},
        {"quant_method": "gptq"},
    ],
    ids=str,
)
def test_other_quantisations_are_refused(tmp_path, both, changed):
    values = {**both[0], "quantization_config": {**SETTINGS, **changed}}
    with pytest.raises(UserError, match="which is not read, only fp8"):
        load_pretrained(write_checkpoint(tmp_path / "fp8", values, both[2]))


def test_8_bit_tensors_of_a_model_that_names_no_blocks_are_refused(tmp_path, both):
    with pytest.raises(UserError, match="is F8_E4M3, a quantised or whole-number type"):
        load_pretrained(write_checkpoint(tmp_path / "fp8", both[1], both[2]))

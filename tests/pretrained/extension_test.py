"""Attached and split models on disk: written by the commands, read back unchanged, refused if damaged."""

import json

import numpy as np
import pytest

import anyexperts_jax as ax
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import named_leaves
from anyexperts_jax.pretrained.random_model import random_model
from pretrained.tiny_hub import hub_values, tiny_checkpoint

pytest.importorskip("safetensors")


def assert_same(found, expected):
    assert found.config == expected.config
    found, expected = named_leaves(found.params), named_leaves(expected.params)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_model_from_attach_is_read_back_unchanged(tmp_path, capsys):
    folder, out = tiny_checkpoint(tmp_path / "hub", "sarvam_moe"), tmp_path / "out"
    options = ["--k-min", "2", "--k-max", "4", "--virtual", "3"]
    assert main(["attach", str(folder), str(out), *options]) == 0
    assert "2 to 4 slots, computing what the base computes" in capsys.readouterr().out
    base, found = ax.load_pretrained(folder), ax.load_pretrained(out)
    assert_same(found, ax.attach(base, k_min=2, k_max=4, num_virtual=3))
    assert found.router_bias_LC.shape == (2, 11)
    assert_same(ax.detach(found), base)
    with pytest.raises(UserError, match=r"no place for a model that is attached; use form='anyexperts', or detach it"):
        found.export(tmp_path / "hub_form")
    assert main(["attach", str(folder), str(out), *options]) == 2
    assert "exists; name a new folder" in capsys.readouterr().err


def test_a_model_from_split_is_read_back_unchanged(tmp_path, capsys):
    folder, out = tiny_checkpoint(tmp_path / "hub", "llama"), tmp_path / "out"
    assert main(["split", str(folder), str(out), "--experts", "4", "--shared", "1", "--markers", "2"]) == 0
    told = capsys.readouterr()
    assert "4 experts of 5 neurons, 1 of them shared" in told.out
    assert "random tokens" in told.err
    base, found = ax.load_pretrained(folder), ax.load_pretrained(out)
    assert_same(found, ax.split(base, num_experts=4, num_shared=1, markers=2))
    assert_same(ax.merge(found), base)
    with pytest.raises(UserError, match="a model that is split; use form='anyexperts', or merge it first"):
        found.export(tmp_path / "hub_form")


def test_slots_attached_to_a_split_model_are_read_back_unchanged(tmp_path):
    base = random_model(hub_values("llama"))
    slots = ax.attach(ax.split(base, num_experts=5, num_shared=1, markers=2), k_min=2, k_max=5, num_virtual=1)
    slots.export(tmp_path / "out", "anyexperts")
    found = ax.load_pretrained(tmp_path / "out")
    assert_same(found, slots)
    np.testing.assert_array_equal(found.order_LF, slots.order_LF)
    assert_same(ax.merge(found), base)


def damaged(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_damaged_extension_is_one_line(tmp_path):
    base = random_model(hub_values("llama"))
    with pytest.raises(UserError, match="is for a model with attached slots or split networks"):
        base.export(tmp_path / "plain", "anyexperts")
    ax.split(base, num_experts=4).export(tmp_path / "out", "anyexperts")
    settings = json.loads((tmp_path / "out" / "anyexperts.json").read_text())
    for changes, message in (
        ({"kind": "torn"}, "kind='torn'"),
        ({"moe": {**settings["moe"], "later": 1}}, "later of moe are not known"),
        ({"moe": {**settings["moe"], "router_markers": 3}}, r"gate_kernel is \[3, 28, 16\], .* wants \[3, 28, 12\]"),
    ):
        damaged(tmp_path / "out", "anyexperts.json", **{**settings, **changes})
        with pytest.raises(UserError, match=message):
            ax.load_pretrained(tmp_path / "out")
    (tmp_path / "out" / "anyexperts.safetensors").unlink()
    damaged(tmp_path / "out", "anyexperts.json", **settings)
    with pytest.raises(UserError, match=r"holds anyexperts.json, but no anyexperts.safetensors"):
        ax.load_pretrained(tmp_path / "out")

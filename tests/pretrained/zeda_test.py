"""ZEDA's zero experts, read as virtual experts without a cap that return nothing or the block's input."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import anyexperts_jax as ax
from anyexperts_jax import MoE
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import named_leaves, params_of_leaves
from anyexperts_jax.pretrained.random_model import random_model
from pretrained.tiny_hub import hub_values, random_tensors, tensors_in, write_checkpoint

pytest.importorskip("safetensors")
TOKENS_BT = np.random.default_rng(0).integers(0, 53, (3, 23))
EXPERTS, ZERO = 7, 5


def zeda_values(**changes):
    own = {"architectures": ["Qwen3MoePlusPlusForCausalLM"], "use_zce_mask": False}
    return {**hub_values("qwen3_moe"), **own, "zce_nums": [ZERO], "zce_types": ["zero"], **changes}


def widened(values, tensors):
    """Returns a plain Qwen3-MoE with the same function: a zero expert becomes an expert whose weights are all zero."""
    layers = range(values["num_hidden_layers"])
    empty = {
        f"model.layers.{i}.mlp.experts.{EXPERTS + z}.{name}_proj.weight": np.zeros_like(
            tensors[f"model.layers.{i}.mlp.experts.0.{name}_proj.weight"]
        )
        for i in layers
        for z in range(ZERO)
        for name in ("gate", "up", "down")
    }
    plain = {key: value for key, value in values.items() if "zce" not in key}
    own = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": EXPERTS + ZERO}
    return {**plain, **own}, {**tensors, **empty}


@pytest.mark.parametrize("normalised", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_zero_expert_equals_an_expert_of_zero_weights(tmp_path, normalised):
    values = zeda_values(norm_topk_prob=normalised)
    tensors = random_tensors(values, seed=3)
    zeda = ax.load_pretrained(write_checkpoint(tmp_path / "zeda", values, tensors))
    wide = ax.load_pretrained(write_checkpoint(tmp_path / "wide", *widened(values, tensors)))
    ours, theirs = zeda.forward(TOKENS_BT), wide.forward(TOKENS_BT)
    np.testing.assert_allclose(ours.logits_BTY, theirs.logits_BTY, atol=2e-5)
    chosen = np.asarray(theirs.trace.expert_ids_BTK) < EXPERTS
    np.testing.assert_array_equal(ours.trace.real_slots_BT, chosen.sum(axis=-1))
    assert set(np.unique(ours.trace.real_slots_BT)) == {0, 1, 2, 3}  # no cap: some tokens get no real expert at all


@pytest.mark.parametrize("kind", ["zero", "copy"])
def test_what_a_zero_expert_returns(kind):
    """Compares a layer with the formula: softmax over all columns, top-k, weights that sum to one."""
    moe = random_model(zeda_values(zce_types=[kind])).config.moe
    assert moe.switches.virtual_output == {"zero": "zero", "copy": "identity"}[kind]
    rng = np.random.default_rng(1)
    shapes = {"w_gate_EDF": (EXPERTS, 6, 4), "w_up_EDF": (EXPERTS, 6, 4), "w_down_EFD": (EXPERTS, 4, 6)}
    experts = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    kernel = rng.normal(size=(6, EXPERTS + ZERO)).astype(np.float32)
    x_ND = rng.normal(size=(40, 6)).astype(np.float32)
    params = {
        "router": {"kernel": jnp.asarray(kernel)},
        "experts": {name: jnp.asarray(w) for name, w in experts.items()},
    }
    y_1ND, _ = MoE(moe, d_ff=4).apply({"params": params}, jnp.asarray(x_ND)[None])
    for x_D, y_D in zip(x_ND, np.asarray(y_1ND[0]), strict=True):
        scores = np.exp(x_D @ kernel)
        best = np.argsort(-scores)[: moe.slots_bound]
        expected = np.zeros(6)
        for column in best:
            if column < EXPERTS:
                gate, up = x_D @ experts["w_gate_EDF"][column], x_D @ experts["w_up_EDF"][column]
                out = (gate / (1 + np.exp(-gate)) * up) @ experts["w_down_EFD"][column]
            else:
                out = x_D if kind == "copy" else 0.0
            expected += scores[column] / scores[best].sum() * out
        np.testing.assert_allclose(y_D, expected, atol=3e-5)


def test_an_export_equals_the_checkpoint(tmp_path):
    values = zeda_values()
    folder = write_checkpoint(tmp_path / "zeda", values, random_tensors(values))
    model = ax.load_pretrained(folder)
    model.export(tmp_path / "out")
    before, after = tensors_in(folder), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert ax.load_pretrained(tmp_path / "out").config == model.config
    with pytest.raises(UserError, match=f"has {ZERO} virtual experts of its own; leave out num_virtual=2"):
        ax.attach(model, k_min=2, k_max=4, num_virtual=2)


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    values = zeda_values()
    base = ax.load_pretrained(write_checkpoint(tmp_path_factory.mktemp("hub") / "zeda", values, random_tensors(values)))
    return base, ax.attach(base, k_min=2, k_max=5)


def test_attached_slots_change_no_bit_and_its_zero_experts_stay(attached):
    base, slots = attached
    valid_BT = np.arange(23) < np.array([23, 12, 1])[:, None]
    ours, theirs = slots.forward(TOKENS_BT, valid_BT), base.forward(TOKENS_BT, valid_BT)
    np.testing.assert_array_equal(ours.logits_BTY, theirs.logits_BTY)
    for name in ("real_slots_BT", "virtual_slots_BT"):
        np.testing.assert_array_equal(getattr(ours.trace, name), getattr(theirs.trace, name))
    assert int(ours.trace.virtual_slots_BT.sum()) > 0
    new = named_leaves(slots.params).keys() - named_leaves(base.params).keys()
    assert any(name.endswith("moe/strength") for name in new)
    assert not any("router" in name for name in new)


def test_detach_and_the_files_give_back_what_was_attached_to(attached, tmp_path):
    base, slots = attached
    back = ax.detach(slots)
    assert back.config == base.config
    found, expected = named_leaves(back.params), named_leaves(base.params)
    assert found.keys() == expected.keys()
    assert all(found[name] is expected[name] for name in expected)
    slots.export(tmp_path / "slots", form="anyexperts")
    again = ax.load_pretrained(tmp_path / "slots")
    assert again.config == slots.config
    np.testing.assert_array_equal(again.logits(TOKENS_BT), slots.logits(TOKENS_BT))
    with pytest.raises(UserError, match="detach it first"):
        slots.export(tmp_path / "hub")


def test_importance_moves_zero_and_real_experts_of_attached_slots(attached):
    """A strength that training has moved lets importance decide how many slots a token has, zero experts among them."""
    _, slots = attached
    leaves = named_leaves(slots.params)
    random = np.random.default_rng(0)
    for name, leaf in leaves.items():
        if name.endswith("moe/strength"):
            leaves[name] = jnp.full_like(leaf, 0.7)
        if name.endswith("importance/out/kernel"):
            leaves[name] = jnp.asarray(random.normal(size=leaf.shape) * 3, leaf.dtype)
    trained = dataclasses.replace(slots, params=params_of_leaves(slots.config, leaves))
    trace = trained.forward(TOKENS_BT).trace
    slots_BT = np.asarray(trace.real_slots_BT + trace.virtual_slots_BT)
    assert set(np.unique(slots_BT)) > {3}
    assert slots_BT.min() >= 2
    assert slots_BT.max() <= 5
    assert int(trace.virtual_slots_BT.sum()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zce_types": ["constant"]}, r"zce_types=\['constant'\] is not supported, only zero, copy"),
        ({"zce_types": ["zero", "copy"], "zce_nums": [2, 3]}, "only one kind is supported"),
        ({"zce_nums": [0]}, r"zce_nums=\[0\] must hold a whole number >= 1"),
        ({"zce_nums": None}, "has no zce_nums"),
        ({"use_zce_mask": True}, "use_zce_mask=True is not supported, only false"),
        ({"use_zce_mask": None}, "has no use_zce_mask"),
    ],
)
def test_unsupported_configurations_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        random_model(zeda_values(**changes))


@pytest.mark.slow
def test_a_model_trained_with_zero_experts_exports_as_zeda(tmp_path, capsys):
    from anyexperts_jax.tokenizers.train import train_tokenizer

    random_model(hub_values("qwen3_moe", vocab_size=300, num_hidden_layers=2)).export(tmp_path / "base")
    train_tokenizer(["a cat on the mat and a dog"], 280).save(tmp_path / "base")
    lines = [json.dumps({"question": f"say {i}", "answer": str(i)}) for i in range(64)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    short = ("train.steps=2", "optim.warmup_steps=1", "train.batch_size=8", "train.eval_examples=2")
    zero = ("model.moe.num_virtual=4", "model.moe.rho_max=0.36", "model.moe.switches.cap_rounding=off")
    zero += ("model.moe.switches.virtual_logits=unbiased", "model.moe.switches.virtual_output=zero")

    def train(start, run, settings):
        options = [part for setting in settings for part in ("--set", setting)]
        data = ["--data", f"mine={tmp_path / 'mine.jsonl'}", "--set", "data.encoding.max_length=32"]
        assert main(["train", str(start), "--run", str(run), *data, *options]) == 0, capsys.readouterr().err

    train(tmp_path / "base", tmp_path / "run", (*short, *zero))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hub")]) == 2
    assert "form='hub' has no place for how the model routes: num_virtual=4, not 0" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "zeda"), "--as", "zeda"]) == 0
    found = ax.load_pretrained(tmp_path / "zeda")
    assert found.family == "zeda"
    assert found.config.moe.num_virtual == 4
    train(tmp_path / "zeda", tmp_path / "again", short)
    assert main(["export", str(tmp_path / "again"), str(tmp_path / "tuned")]) == 0, capsys.readouterr().err
    assert ax.load_pretrained(tmp_path / "tuned").config == found.config

"""Mixtures from published dense models: they compute what those do, are written in the hub's layout, and train."""

import json

import numpy as np
import pytest
from pretrained.tiny_hub import hub_values

import anyexperts_jax as ax
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import named_leaves
from anyexperts_jax.pretrained.random_model import random_model

pytest.importorskip("safetensors")
TOKENS_BT = np.random.default_rng(0).integers(0, 53, (2, 13))
CASES = {
    "llama": ({"num_experts": 9, "num_experts_per_tok": 3}, {}),  # a dense model ignores them
    "llama tied": ({"attention_bias": False, "mlp_bias": False}, {"experts_per_token": 1}),
    "qwen3": ({"num_hidden_layers": 4}, {"moe_every": 2}),
}


@pytest.mark.parametrize("case", ["llama", *(pytest.param(case, marks=pytest.mark.slow) for case in list(CASES)[1:])])
def test_the_first_forward_pass_equals_the_dense_models(tmp_path, case):
    changes, how = CASES[case]
    dense = random_model(hub_values(case, **changes))
    mixture = ax.upcycle(dense, num_experts=5, **how)
    output = mixture.forward(TOKENS_BT)
    np.testing.assert_allclose(output.logits_BTY, dense.logits(TOKENS_BT), atol=2e-5)
    assert len(np.unique(output.trace.expert_ids_BTK)) > 2  # whatever the router chooses
    mixture.export(tmp_path / "out")
    read = ax.load_pretrained(tmp_path / "out")
    assert read.config == mixture.config
    assert read.family == mixture.family
    found, expected = named_leaves(read.params), named_leaves(mixture.params)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_experts_can_differ_at_the_start():
    dense = random_model(hub_values("qwen3"))
    mixture = ax.upcycle(dense, num_experts=3, num_dense_layers=1, init="noise", seed=4)
    assert mixture.config.stack.num_dense_layers == 1
    experts = named_leaves(mixture.params)["decoder/moe_layers/moe/experts/w_up_EDF"]
    assert not np.array_equal(experts[:, 0], experts[:, 1])
    np.testing.assert_array_equal(experts[0, 0], named_leaves(dense.params)["decoder/dense_1/mlp/up/kernel"])


@pytest.mark.parametrize(
    ("case", "changes", "how", "message"),
    [
        ("qwen3_moe", {}, {}, "the model has experts already"),
        ("llama", {"attention_bias": True}, {}, "the model has biases"),
        ("llama", {}, {"moe_every": 3}, "has them in every layer"),
        ("qwen3", {}, {"moe_every": 2}, "moe_every=2 must divide the model's 3 layers"),
        ("qwen3", {}, {"num_dense_layers": 3}, "which must leave some"),
        ("qwen3", {}, {"num_experts": 2, "experts_per_token": 3}, "3 of 2 experts a token"),
    ],
)
def test_impossible_upcycling_is_refused_in_one_line(case, changes, how, message):
    with pytest.raises(UserError, match=message):
        ax.upcycle(random_model(hub_values(case, **changes)), **how)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """A dense checkpoint with a tokenizer, and a text to train on."""
    from anyexperts_jax.tokenizers.train import train_tokenizer

    folder = tmp_path_factory.mktemp("dense")
    values = hub_values("qwen3", vocab_size=300, num_hidden_layers=2, max_position_embeddings=32)
    random_model(values).export(folder / "hub")
    train_tokenizer(["a cat on the mat and a dog"], 280).save(folder / "hub")
    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(64)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return folder


SHORT = ["--set", "train.eval_examples=2", "--set", "data.encoding.max_length=32"]


@pytest.mark.slow
def test_a_mixture_trains_like_any_checkpoint(tmp_path, dense_folder, capsys):
    command = ["upcycle", str(dense_folder / "hub"), str(tmp_path / "mixture"), "--experts", "3"]
    assert main(command) == 0
    assert "Qwen3MoeForCausalLM, 2 layers with 3 experts" in capsys.readouterr().out
    steps = ["--set", "train.steps=3", "--set", "optim.warmup_steps=1", "--set", "train.batch_size=8"]
    data = ["--data", f"mine={dense_folder / 'chats.jsonl'}", "--run", str(tmp_path / "run")]
    assert main(["train", str(tmp_path / "mixture"), *data, *steps, *SHORT]) == 0, capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "tuned")]) == 0
    before, after = (ax.load_pretrained(tmp_path / name) for name in ("mixture", "tuned"))
    assert after.config == before.config
    assert not np.array_equal(
        named_leaves(after.params)["decoder/moe_layers/moe/experts/w_up_EDF"],
        named_leaves(before.params)["decoder/moe_layers/moe/experts/w_up_EDF"],
    )


@pytest.mark.slow
def test_evolution_starts_from_a_published_model(tmp_path, dense_folder, capsys):
    """Through all three stages, and back as a published mixture."""
    stages = [
        pair
        for name in ("warm_up", "evolving", "routing")
        for pair in ("--set", f"evolve.{name}={{steps=2, lr=1e-3, batch_size=8}}")
    ]
    policy = ["--set", "evolve.moe.router=linear", "--set", "evolve.upcycle.moe_every=1"]
    data = ["--data", f"mine={dense_folder / 'chats.jsonl'}", "--run", str(tmp_path / "run")]
    every = ["--set", "train.checkpoint_every=2", "--set", "train.eval_every=2"]
    command = ["evolve", str(dense_folder / "hub"), *data, *stages, *policy, *every, *SHORT]
    assert main(command) == 0, capsys.readouterr().err
    assert main(["export", str(tmp_path / "run" / "routing"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    found = ax.load_pretrained(tmp_path / "out")
    assert found.family == "qwen3_moe"
    assert (found.config.moe.num_experts, found.config.moe.k_max) == (4, 1)
    assert found.logits(TOKENS_BT).shape == (2, 13, 300)

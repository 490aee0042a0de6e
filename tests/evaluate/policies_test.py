"""Policies on a pretrained model: the experts they give each token, the realised budgets, and the command's table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained.tiny_hub import hub_values

import anyexperts_jax as ax
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.registries import POLICIES
from anyexperts_jax.evaluate.dials import find_dial
from anyexperts_jax.evaluate.policies import (
    DENSE,
    LAYERS,
    MODES,
    ORACLE,
    Pass,
    TextSample,
    _oracle,
    measure_policies,
    policy_names,
    slots_of_layers,
)
from anyexperts_jax.pretrained.random_model import random_model
from anyexperts_jax.routing.policies import Seen

SHAPE = hub_values("qwen3_moe", num_hidden_layers=2, vocab_size=300, eos_token_id=299)


@pytest.fixture(scope="module")
def model():
    return random_model(SHAPE)


@pytest.fixture(scope="module")
def sample():
    return TextSample(np.random.default_rng(0).integers(0, 300, (4, 32)), 400)


def seen(seed=0, tokens=512, experts=8):
    logits = 2 * np.random.default_rng(seed).standard_normal((tokens, experts)).astype(np.float32)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Seen(jnp.asarray(logits), jnp.asarray(scores))


@pytest.mark.parametrize(
    ("name", "dial", "expected"),
    [
        ("static", 2.4, [2, 2]),
        ("top_p", 0.55, [2, 1]),
        ("top_p", 0.99, [4, 2]),
        ("score_gap", 0.5, [3, 1]),
        ("threshold", 0.15, [3, 1]),
        ("logit_threshold", -1.0, [2, 1]),
    ],
)
def test_a_policy_gives_the_expected_experts(name, dial, expected):
    scores = jnp.asarray([[0.4, 0.1, 0.3, 0.2], [0.0, 0.0, 0.9, 0.1]])
    logits = jnp.asarray([[0.0, -5.0, -0.5, -2.0], [-9.0, -9.0, 3.0, -3.0]])
    given = POLICIES[name].slots(Seen(logits, scores), jnp.float32(dial))
    np.testing.assert_array_equal(jnp.maximum(given, 1), expected)


@pytest.mark.parametrize("name", POLICIES.names())
def test_a_dial_is_found_for_a_mean(name):
    layers = jax.tree.map(lambda part: part[None], seen())
    dial = find_dial(name, layers, 3.0, 8)
    given = np.clip(POLICIES[name].slots(seen(), jnp.float32(dial)), 1, 8)
    assert abs(given.mean() - 3) < 0.02


def test_shuffling_permutes_the_numbers_of_experts():
    given, shuffled = (POLICIES[name].slots(seen(), jnp.float32(0.7)) for name in ("top_p", "shuffled"))
    np.testing.assert_array_equal(np.sort(given), np.sort(shuffled))
    assert (given != shuffled).any()


def test_layers_get_more_where_scores_are_spread():
    flat, steep = np.full((5, 4), 0.25), np.tile([0.97, 0.01, 0.01, 0.01], (5, 1))
    assert slots_of_layers(np.stack([flat, steep]).astype(np.float32), 2.5).tolist() == [4, 1]


@pytest.mark.slow
def test_every_policy_realises_its_budget_on_the_data(model, sample):
    names = ("static", "mixed", "top_p", LAYERS, MODES, ORACLE)
    own, *found = measure_policies(model, sample, [2.5], names, batch_rows=2)
    assert (own.policy, own.realised) == ("own", 3.0)
    assert [one.policy for one in found] == list(names)
    realised = {one.policy: one.realised for one in found}
    assert realised["static"] in (2, 3)
    assert realised[LAYERS] == 2.5
    assert abs(realised["mixed"] - 2.5) < 0.15
    assert abs(realised["top_p"] - 2.5) < 0.15
    assert abs(realised[MODES] - 2.5) < 0.15
    assert 1 <= realised[ORACLE] <= 2.5
    nats = {one.policy: one.nats for one in found}
    assert nats[ORACLE] < nats["mixed"]
    assert 1 <= found[0].unique <= 7
    assert own.bits_per_byte == pytest.approx(own.nats * 4 * 31 / np.log(2) / 400)


def test_the_oracle_takes_fewer_where_fewer_do_better():
    """The oracle is an upper bound at its budget: it need not spend all of it."""
    one = lambda *nats: Pass(np.array([nats]), 0.0, 0.0, seconds=1.0)  # noqa: E731
    two, four, eight = one(1.0, 1.0, 1.0, 1.0), one(1.5, 1.5, 1.5, 1.5), one(0.1, 0.2, 0.6, 0.9)
    chosen = _oracle({2: two, 4: four, 8: eight}, 5)
    assert chosen.nats_BT.tolist() == [[0.1, 0.2, 1.0, 1.0]]
    assert chosen.realised == 5
    assert _oracle({2: two, 4: four}, 4).realised == 2


def test_a_configured_policy_is_used_in_training_too(model, sample):
    moe = dataclasses.replace(model.config.moe, k_min=5, k_max=5, policy="top_p", policy_dial=0.4)
    changed = dataclasses.replace(model, config=dataclasses.replace(model.config, moe=moe))
    slots = np.asarray(changed.forward(sample.tokens_BT).trace.real_slots_BT)
    assert slots.min() >= 1
    assert 1 < len(np.unique(slots)) <= 5
    with pytest.raises(UserError, match="policy='top_p' reads no importance"):
        dataclasses.replace(moe, k_min=2)
    with pytest.raises(UserError, match="policy='best'"):
        dataclasses.replace(moe, policy="best")


def test_a_model_with_attached_slots_is_measured_by_importance(model, sample):
    attached = ax.attach(model, k_min=2, k_max=4, num_virtual=2)
    assert policy_names(attached) == ("importance",)
    with pytest.raises(UserError, match="policy='top_p'"):
        measure_policies(attached, sample, [2], ["top_p"])
    own, found = measure_policies(attached, sample, [2.4])
    assert own.realised == 3
    assert found.policy == "importance"


@pytest.mark.slow
def test_a_split_model_is_compared_with_its_dense_source(sample):
    dense = random_model(hub_values("llama", num_hidden_layers=2, vocab_size=300, eos_token_id=299))
    split = ax.split(dense, num_experts=5, num_shared=1)
    assert policy_names(split)[0] == DENSE
    assert policy_names(ax.attach(split, k_min=2, k_max=4)) == (DENSE, "importance")
    assert DENSE not in policy_names(random_model(SHAPE))
    lines = []
    whole, own, *found = measure_policies(split, sample, [3, 2], [DENSE, "static"], note=lines.append)
    assert (whole.policy, own.policy) == (DENSE, "own")
    assert whole.nats == pytest.approx(own.nats, abs=1e-4)
    assert np.isnan([whole.budget, whole.realised, whole.unique]).all()
    assert [(one.policy, one.realised) for one in found] == [("static", 3), ("static", 2)]
    assert [line.partition(":")[0] for line in lines] == ["dense", "own at 4", "static at 3", "static at 2"]


def test_the_command_prints_one_table(tmp_path, capsys, model):
    pytest.importorskip("tokenizers")
    from anyexperts_jax.tokenizers.train import train_tokenizer

    text = "Hello world. A cat sat on the mat; the cat sat. " * 8
    model.export(tmp_path / "hub")
    train_tokenizer([text], 300).save(tmp_path / "hub")
    (tmp_path / "wiki.txt").write_text(text)
    options = ["--text", str(tmp_path / "wiki.txt"), "--budget", "2", "--policy", "static", "--length", "16"]
    assert main(["evaluate", str(tmp_path / "hub"), *options]) == 0
    told = capsys.readouterr().out
    assert "perplexity" in told
    assert "2.000" in told
    assert main(["evaluate", str(tmp_path / "hub"), *options, "--page", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "README.md").read_text()
    assert "--budget 2 --policy static --tokens 4096 --length 16 --batch-rows 4" in page
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "hub"), *options, "--budget", "9"]) == 2
    assert "budget=9 must be from 1 to 7 experts a token" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "hub"), "--budget", "2"]) == 2
    assert "give --text FILE" in capsys.readouterr().err

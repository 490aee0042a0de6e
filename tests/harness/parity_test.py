"""Compares our likelihoods with those of lm-eval's HFLM, which runs transformers, on one tiny checkpoint."""

import pytest
from serve.tiny import tiny_folder

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("safetensors")

PAIRS = [
    ("Hello", " world"),
    ("A cat sat on", " the mat"),
    ("", "Hello world"),
    ("cat on the mat; ", "the cat"),
    ("Hello world " * 12, "A cat"),
    ("x", "yz"),
]
TEXTS = ["Hello world cat on the mat; the cat", "A", "A cat sat " * 20]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    from anyexperts_jax.harness.lm import HarnessLM
    from anyexperts_jax.serve.model import load_served

    folder = tiny_folder(tmp_path_factory.mktemp("hub") / "tiny")
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, max_length=96)
    return HarnessLM(load_served(folder), None, rows=2), theirs


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_likelihoods_agree(sides):
    ours, theirs = (side.loglikelihood(instances("loglikelihood", PAIRS)) for side in sides)
    for one, other in zip(ours, theirs, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]


def test_rolling_likelihoods_agree(sides):
    asked = [(text,) for text in TEXTS]
    ours, theirs = (side.loglikelihood_rolling(instances("loglikelihood_rolling", asked)) for side in sides)
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_generated_answers_agree(sides):
    asked = [(text, {"until": ["the"], "max_gen_toks": 8, "do_sample": False}) for text in TEXTS]
    ours, theirs = (side.generate_until(instances("generate_until", asked)) for side in sides)
    assert ours == theirs


def test_encoded_prompts_and_chat_templates_agree(sides):
    ours, theirs = sides
    for text in TEXTS:
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "A cat"}]
    for messages, generation_prompt in ((history[:1], True), (history, False)):
        one, other = (side.apply_chat_template(messages, add_generation_prompt=generation_prompt) for side in sides)
        assert one == other
    assert ours.prefix_token_id == theirs.prefix_token_id

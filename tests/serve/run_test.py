"""A trained run, served: pictures beside text, the run's own window, several budgets in one batch."""

import base64
import io

import numpy as np
import pytest
from evaluate.stand_in import trained
from PIL import Image

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evaluate.ask import MAX_NEW_TOKENS, ask, own_example
from anyexperts_jax.serve.engine import Engine, Finished
from anyexperts_jax.serve.model import serve_trained
from serve.tiny import job, text_of, tokens_of

pytestmark = pytest.mark.slow
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)


@pytest.fixture(scope="module")
def one():
    return trained()


@pytest.fixture(scope="module")
def served(one):
    return serve_trained(one, "mine", max_budget=5.2)


@pytest.fixture(scope="module")
def engine(served):
    ignored = lambda name, amount: None  # noqa: E731
    return Engine(served.weights, served.tokenizer, served.stop_ids, slots=3, length=served.longest, watch=ignored)


def data_url():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def conversation(question="what is it?", url=None):
    parts = [{"type": "image_url", "image_url": {"url": url or data_url()}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


CASES = [
    (conversation(), None),
    (conversation(), 2.8),
    ([{"role": "user", "content": "4 plus 3 is?"}], 5.2),
    (conversation("which digit?"), 4.0),
]


def answers(served, engine, cases):
    events = [[] for _ in cases]
    for own, (messages, budget) in zip(events, cases, strict=True):
        engine.submit(job(served, served.reader.chat(messages), MAX_NEW_TOKENS, budget, own))
    while engine.step():
        continue
    return events


def test_batched_answers_equal_single_ones_and_those_of_ask(one, served, engine):
    together = answers(served, engine, CASES)
    for case, events in zip(CASES, together, strict=True):
        (alone,) = answers(served, engine, [case])
        assert tokens_of(events) == tokens_of(alone)
        assert events[-1] == alone[-1]
    for number in (0, 1):
        example = own_example("what is it?", one.config.data.encoding, image=PIXELS)
        reply = ask(one, example, CASES[number][1])
        assert text_of(together[number]) == reply.answer


def test_a_lower_budget_uses_fewer_experts_in_every_layer(served, engine):
    low, high = (answers(served, engine, [(conversation(), budget)])[0][-1] for budget in (2.8, 5.2))
    assert isinstance(low, Finished)
    assert len(low.usage.real_by_layer) == 2
    assert low.usage.real_experts + 1 < high.usage.real_experts


def test_a_plain_text_is_read_as_the_beginning_of_a_document(served):
    prompt = served.reader.text("abc")
    assert prompt.tokens == (served.tokenizer.special.bos, *b"abc")
    assert served.reader.ids([1, 2]).tokens == (1, 2)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (conversation(url="https://example.org/cat.png"), "the server fetches nothing"),
        (conversation(url="data:image/png;base64,!!"), "the data is not base64"),
        (conversation(url="data:image/png;base64,AAAA"), r"messages\[0\].content\[0\]"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "this model reads text, image_url"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}], "must be an object with the text url"),
        ([{"role": "user", "content": 3}], "must be a text or a list of parts"),
        ([{"role": "wizard", "content": "a"}], "role='wizard' is unknown"),
        ([{"role": "user", "content": "a", "name": "me"}], "holds name; the run reads role and content"),
        ([{"role": "user", "content": "word " * 200}], "encoding.max_length"),
    ],
)
def test_messages_that_a_run_cannot_read_are_refused(served, messages, said):
    with pytest.raises(UserError, match=said):
        served.reader.chat(messages)

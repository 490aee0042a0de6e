"""Random requests to a real server: each gets an answer or a one-line error, never status 500, never a hang."""

import json

import pytest
from serve.app_test import send, until

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "input_audio", "video", 3])},
    optional={"text": ANYTHING, "image_url": ANYTHING, "input_audio": ANYTHING},
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", "wizard"])},
        optional={"content": st.text(st.characters(), max_size=12) | st.lists(PARTS, max_size=2), "name": ANYTHING},
    ),
    max_size=3,
)
NUMBERS = st.integers(-2, 40) | st.floats(-1, 3)
FIELDS = {
    "prompt": st.text(st.characters(), max_size=12) | st.lists(st.integers(-1, 301), max_size=8),
    "messages": MESSAGES,
    "max_tokens": st.integers(-1, 12),
    "budget": NUMBERS,
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "top_k": NUMBERS,
    "min_p": NUMBERS,
    "n": st.integers(0, 4),
    "seed": st.integers(-1, 2**33),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": ANYTHING, "other": ANYTHING}),
    "logprobs": st.booleans() | st.integers(-1, 22),
    "top_logprobs": st.integers(-1, 22),
    "echo": ANYTHING,
    "logit_bias": ANYTHING,
    "response_format": ANYTHING,
}
PATHS = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}


@st.composite
def bodies(draw, needed):
    """Draws a request with some of the fields; one field may be replaced by an arbitrary value."""
    names = draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=4)) - {"prompt", "messages"}
    body = {"model": "tiny", "max_tokens": 3, **{name: draw(FIELDS[name]) for name in sorted({needed, *names})}}
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from([*sorted(body), "another"]))] = draw(ANYTHING)
    return body


def check_answer(status, headers, answer):
    assert status < 500, answer
    if status == 200:
        streamed = headers["content-type"].startswith("text/event-stream")
        assert answer.endswith("data: [DONE]\n\n") if streamed else answer["choices"]
        return
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_random_requests_get_an_answer_or_a_one_line_error(path, url, service, fuzz_case):
    @hypothesis.seed(fuzz_case)
    @hypothesis.settings(
        max_examples=8, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(body=bodies(PATHS[path]))
    def ask(body):
        check_answer(*send(url, "POST", path, body))

    ask()
    until(lambda: service.worker.running == service.worker.waiting == 0)
    assert service.worker.state == "ok"


@pytest.mark.parametrize("path", PATHS)
def test_damaged_bodies_get_an_answer_or_a_one_line_error(path, url, service, fuzz_case):
    whole = json.dumps({"model": "tiny", "prompt": "a", "messages": [{"role": "user", "content": "ä"}]}).encode()

    @hypothesis.seed(fuzz_case)
    @hypothesis.settings(max_examples=4, deadline=None, database=None)
    @hypothesis.given(start=st.integers(0, len(whole)), put=st.binary(max_size=6), cut=st.integers(0, 4))
    def ask(start, put, cut):
        check_answer(*send(url, "POST", path, whole[:start] + put + whole[start + cut :]))

    ask()
    assert service.worker.state == "ok"

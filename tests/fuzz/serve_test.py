"""Random requests to a real server: each gets an answer or a one-line error, never status 500, never a hang."""

import contextlib
import gc
import http.client
import itertools
import json
import urllib.parse

import psutil
import pytest
from serve.app_test import CHAT, send, until

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.tokenizers.bytes import BYTES

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SLOW = list(hypothesis.HealthCheck)  # a request takes as long as it takes
HUGE = st.sampled_from([10**40, -(10**40), 10**400, 1e308, -1e308, 5e-324, 2**31, 2**32, 2**63, -(2**63)])
NUMBER = st.integers(-(2**70), 2**70) | st.floats() | HUGE
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBER | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
VIDEO_HEADS = ("data:video/mp4;base64,", "data:video/jpeg;base64,", "data:video/webm;base64,", "data:image/gif;base64,")
HEADS = ("data:image/png;base64,", "data:image/;base64,", "data:,", "data:image/png,", "https://a.b/", "")
BYTES_64 = ("", "iVBORw0KGgo", "iVBORw0KGgoAAAANSUhEUgAA//8AAP//CAIAAAA=", "R0lGODlhAQABAAAAACw=", "/9j/4AAQ")
DATA_URLS = st.builds(
    "{}{}{}".format, st.sampled_from(HEADS), st.sampled_from(BYTES_64), st.text("AZaz09+/=! \n", max_size=9)
)
FILMS = st.builds(
    "{}{}".format,
    st.sampled_from((*VIDEO_HEADS, *HEADS)),
    st.lists(st.sampled_from(BYTES_64), max_size=3).map(",".join),
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "input_audio", "video_url", "video", 3])},
    optional={
        "text": ANYTHING,
        "image_url": ANYTHING | st.fixed_dictionaries({"url": DATA_URLS | ANYTHING}, optional={"detail": ANYTHING}),
        "video_url": ANYTHING | st.fixed_dictionaries({"url": FILMS | ANYTHING}, optional={"fps": NUMBER | ANYTHING}),
        "input_audio": ANYTHING | st.fixed_dictionaries({"data": DATA_URLS | ANYTHING}, optional={"format": ANYTHING}),
    },
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", "wizard"]) | ANYTHING},
        optional={
            "content": st.text(st.characters(), max_size=12) | st.lists(PARTS, max_size=2) | ANYTHING,
            "name": ANYTHING,
            "tool_calls": ANYTHING,
        },
    ),
    max_size=3,
)
NUMBERS = st.integers(-2, 40) | st.floats(-1, 3) | HUGE
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
    "model": st.sampled_from(["tiny", "tiny ", "other", "../tiny", ""]) | ANYTHING,
    "max_completion_tokens": NUMBERS,
    "frequency_penalty": NUMBERS,
    "user": ANYTHING,
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


def check_answer(status, headers, answer, key="choices"):
    assert status < 500, answer
    if status == 200:
        streamed = headers["content-type"].startswith("text/event-stream")
        assert answer.endswith("data: [DONE]\n\n") if streamed else answer[key]
        return
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_random_requests_get_an_answer_or_a_one_line_error(path, url, service, fuzz_case):
    @hypothesis.seed(fuzz_case)
    @hypothesis.settings(max_examples=8, deadline=None, database=None, suppress_health_check=SLOW)
    @hypothesis.given(body=bodies(PATHS[path]))
    def ask(body):
        check_answer(*send(url, "POST", path, body))

    ask()
    until(lambda: service.worker.running == service.worker.waiting == 0)
    assert service.worker.state == "ok"


LITERALS = (
    *("1e400", "-1e400", "1" * 5000, "-0", "1E-400", "[[1e400]]", '{"a": 1e400}', '"\\ud800"', '"\\u0000"'),
    *("[" * depth + "]" * depth for depth in (50, 900, 990, 3000, 40_000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (900, 3000)),
)


@pytest.mark.parametrize("path", PATHS)
def test_literals_that_python_does_not_write(path, url, service, fuzz_case):
    """Numbers beyond a float, and nesting beyond the interpreter's stack, as any field."""
    needed = PATHS[path]
    whole = {"model": "tiny", "max_tokens": 2, needed: CHAT if needed == "messages" else "a"}

    @hypothesis.seed(fuzz_case)
    @hypothesis.settings(max_examples=12, deadline=None, database=None)
    @hypothesis.given(field=st.sampled_from(sorted({*FIELDS, needed})), literal=st.sampled_from(LITERALS))
    def ask(field, literal):
        check_answer(*send(url, "POST", path, json.dumps({**whole, field: "@"}).replace('"@"', literal).encode()))

    ask()
    until(lambda: service.worker.running == service.worker.waiting == 0)
    assert service.worker.state == "ok"


def test_names_of_models(url, service, fuzz_case):
    @hypothesis.seed(fuzz_case)
    @hypothesis.settings(max_examples=8, deadline=None, database=None)
    @hypothesis.given(name=st.text(st.characters(codec="utf-8"), max_size=9) | st.binary(max_size=6))
    def ask(name):
        check_answer(*send(url, "GET", f"/v1/models/{urllib.parse.quote(name)}"), key="object")

    ask()
    assert service.worker.state == "ok"


def test_what_a_run_with_media_reads(fuzz_case):
    """Broken pictures and sounds, without a model behind them."""
    from anyexperts_jax.serve.model import RunReader

    reader = RunReader(DataConfig(encoding=EncodingSpec(max_length=64, max_patches=8, max_frames=8)), BYTES)

    @hypothesis.seed(fuzz_case)
    @hypothesis.settings(max_examples=16, deadline=None, database=None, suppress_health_check=SLOW)
    @hypothesis.given(messages=MESSAGES)
    def read(messages):
        with contextlib.suppress(UserError):
            assert reader.chat(messages).tokens

    read()


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


SHORT = {"model": "tiny", "prompt": "A cat", "max_tokens": 2}
REQUESTS = [  # (path, body, status)
    ("/v1/completions", SHORT, 200),
    ("/v1/completions", {**SHORT, "stream": True, "logprobs": 3}, 200),
    ("/v1/completions", {**SHORT, "n": 2, "budget": 1.5, "seed": 3}, 200),
    ("/v1/chat/completions", {"model": "tiny", "messages": CHAT, "max_tokens": 2, "stop": ["a"]}, 200),
    ("/v1/chat/completions", {"model": "tiny", "messages": CHAT, "max_tokens": 2, "stream": True}, 200),
    ("/v1/completions", {**SHORT, "budget": 99}, 400),
    ("/v1/completions", {**SHORT, "prompt": "word " * 500}, 400),
    ("/v1/completions", {**SHORT, "model": "other"}, 404),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "wizard"}]}, 400),
    ("/v1/embeddings", {}, 404),
]
GROWTH = 12 * 2**20


@pytest.mark.slow
def test_memory_does_not_grow_over_2000_requests(url, service):
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    cases, process = itertools.cycle(REQUESTS), psutil.Process()

    def resident_after(count):
        for path, body, status in itertools.islice(cases, count):
            connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        gc.collect()
        return process.memory_info().rss

    first = resident_after(200)
    last = resident_after(1800)
    connection.close()
    print(f"resident after 200 requests {first / 2**20:.1f} MiB, after 2,000 {last / 2**20:.1f} MiB")
    assert last - first < GROWTH
    assert service.worker.running == service.worker.waiting == 0

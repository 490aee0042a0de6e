"""The server as clients see it: OpenAI's own client, and malformed requests of every kind."""

import concurrent.futures
import http.client
import json
import re
import socket
import time

import pytest

from serve.tiny import BUDGETS, LENGTHS, PROMPTS

openai = pytest.importorskip("openai")
CHAT = [{"role": "user", "content": "Hello world"}]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def send(url, method, path, body=None, headers=None):
    """Sends a plain request; returns (status, headers, JSON or text). body: bytes, or a value to send as JSON."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, json.loads(text) if "json" in answer.headers["content-type"] else text


def ask(client, prompt, length, budget, **how):
    extra = {"extra_body": {"budget": budget}} if budget else {}
    how = {"temperature": 0, **how}
    return client.completions.create(model="tiny", prompt=list(prompt), max_tokens=length, **how, **extra)


def test_the_list_of_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.max_model_len == 96
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_chat_answer_has_its_text_and_usage(client, served):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=6, temperature=0)
    parts = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": "Hello world"}]}],
        max_completion_tokens=6, temperature=0,
    )  # fmt: skip
    prompt = served.reader.chat(CHAT)
    assert served.tokenizer.decode(prompt.tokens) == "<user>Hello world\n<a>"
    assert answer.choices[0].message.content == parts.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt.tokens)
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == len(prompt.tokens) + 6
    assert answer.usage.real_experts_per_token == 3


def test_a_conversation_of_several_turns(client, served):
    """The template writes `<assistant>` before earlier answers and `<a>` before the answer to be generated."""
    turns = [*CHAT, {"role": "assistant", "content": "A cat"}, {"role": "user", "content": "sat"}]
    answer = client.chat.completions.create(model="tiny", messages=turns, max_tokens=2, temperature=0)
    prompt = served.reader.chat(turns)
    assert served.tokenizer.decode(prompt.tokens) == "<user>Hello world\n<assistant>A cat\n<user>sat\n<a>"
    assert answer.usage.prompt_tokens == len(prompt.tokens)


def test_the_chunks_of_a_stream_join_to_the_whole_answer(client):
    how = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**how, logprobs=True, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(
            **how, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
        )
    )
    said = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert said[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in said) == whole.choices[0].message.content
    assert said[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    told = [token for one in said if one.logprobs for token in one.logprobs.content]
    assert told == whole.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob for token in told)


def test_eight_concurrent_clients_get_the_same_answers_as_alone(client):
    cases = list(zip(PROMPTS, LENGTHS, BUDGETS, strict=True))
    alone = [ask(client, *case, logprobs=1) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = list(pool.map(lambda case: ask(client, *case, logprobs=1), cases))
            assert [one.choices[0].text for one in together] == [one.choices[0].text for one in alone]
            assert [one.choices[0].logprobs.tokens for one in together] == [
                one.choices[0].logprobs.tokens for one in alone
            ]
            assert [one.usage for one in together] == [one.usage for one in alone]
    for budget, one in zip(BUDGETS, alone, strict=True):
        whole = budget is None or budget == round(budget)
        assert one.usage.real_experts_per_token == pytest.approx(budget or 3, abs=1e-6 if whole else 0.3)
        assert one.usage.budget == budget


def test_the_same_seed_repeats_a_sampled_answer(client):
    drawn = [ask(client, (5, 3), 12, None, temperature=1.5, top_p=0.9, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_prompts_and_answers(client):
    answer = client.completions.create(
        model="tiny", prompt=["Hello world", "A cat"], n=2, max_tokens=5, temperature=1.0, seed=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    one = client.completions.create(model="tiny", prompt="A cat", max_tokens=5, temperature=1.0, seed=4)
    assert answer.choices[3].text == one.choices[0].text
    assert answer.usage.completion_tokens == 20


def test_a_stop_text_ends_the_answer_and_is_cut_off(client):
    free = client.completions.create(model="tiny", prompt="Hello world", max_tokens=12, temperature=0).choices[0]
    stop = free.text[3:6]
    answer = client.completions.create(model="tiny", prompt="Hello world", max_tokens=12, temperature=0, stop=[stop])
    assert answer.choices[0].text == free.text[: free.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_the_client_raises_the_right_errors(client):
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; valid: tiny"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="start it with --max-budget 5") as caught:
        ask(client, (1,), 1, 5.0)
    assert caught.value.body["param"] == "budget"


TEXT = {"model": "tiny", "prompt": "a", "max_tokens": 1}
WRONG = [
    (TEXT | {"temperature": 3}, "temperature=3 must be from 0 to 2", "temperature"),
    (TEXT | {"top_p": -1}, "top_p=-1 must be", "top_p"),
    (TEXT | {"top_k": 1.5}, "top_k=1.5 must be a whole number", "top_k"),
    (TEXT | {"max_tokens": 0}, "max_tokens=0 must be a whole number from 1", "max_tokens"),
    (TEXT | {"max_tokens": 200}, "together more than the 96 positions of a slot", None),
    (TEXT | {"prompt": "word " * 200}, "tokens", None),
    (TEXT | {"prompt": []}, "prompt: [] must be a text", "prompt"),
    (TEXT | {"prompt": ""}, "the prompt is empty", None),
    (TEXT | {"prompt": [300]}, "the model has ids 0 to 299", None),
    (TEXT | {"prompt": [[1], "a"]}, "must be a text, a list of token ids", "prompt"),
    (TEXT | {"prompt": "\ud800"}, "half of a surrogate pair", None),
    (TEXT | {"budget": 0.5}, "budget=0.5 must be from 1 to 7", "budget"),
    (TEXT | {"budget": "4"}, "budget='4' must be a finite number", "budget"),
    (TEXT | {"seed": -1}, "seed=-1 must be", "seed"),
    (TEXT | {"stop": [""]}, "none of them empty", "stop"),
    (TEXT | {"stream": "yes"}, "must be true or false", "stream"),
    (TEXT | {"logprobs": 21}, "logprobs=21 must be", "logprobs"),
    (TEXT | {"n": 17}, "n=17 must be", "n"),
    (TEXT | {"prompt": ["a"] * 9, "n": 2}, "18 answers are asked for", "n"),
    (TEXT | {"best_of": 3}, "best_of=3 is not supported", "best_of"),
    (TEXT | {"temprature": 1}, "'temprature' is no field of this request; valid: budget", "temprature"),
    ({"model": "tiny"}, "prompt is missing", "prompt"),
    ({"prompt": "a"}, "model is missing", "model"),
    ([], "the body must be a JSON object", None),
    (b"{", "the body is not JSON", None),
    (b'{"model": NaN}', "NaN is no JSON number", None),
    (b"[" * 90_000, "the body is not JSON", None),
    (b"\xff\xfe{}", "the body is not JSON", None),
]


@pytest.mark.parametrize(("body", "said", "field"), WRONG, ids=range(len(WRONG)))
def test_a_bad_request_is_answered_with_400_and_one_line(url, body, said, field):
    status, _, answer = send(url, "POST", "/v1/completions", body)
    assert status == 400, answer
    error = answer["error"]
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: [] must be a list of objects"),
        ([{"role": "wizard", "content": "a"}], "'wizard'"),
        ([{"content": "a"}], "has no role"),
        ([{"role": "user", "content": 3}], "its content is a int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
            "this model reads text",
        ),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_a_bad_conversation_is_answered_with_400(url, messages, said):
    status, _, answer = send(url, "POST", "/v1/chat/completions", {"model": "tiny", "messages": messages})
    assert status == 400, answer
    assert said in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/v1/completions", None, {}, 405),
        ("POST", "/v1/embeddings", {}, {}, 404),
        ("GET", "/v1/models/other", None, {}, 404),
        ("POST", "/v1/completions", b"x" * 200_000, {}, 413),
        ("POST", "/v1/completions", TEXT, {"content-type": "text/plain"}, 415),
    ],
)
def test_other_errors_have_their_own_status(url, method, path, body, headers, status):
    found, _, answer = send(url, method, path, body, headers)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slots(url, service, stream):
    body = json.dumps(
        {"model": "tiny", "prompt": "A cat", "max_tokens": 80, "temperature": 1.0, "n": 8, "stream": stream}
    )
    host, _, port = url.removeprefix("http://").partition(":")
    gone = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    gone.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
    until(lambda: service.worker.running == 4)
    gone.close()
    until(lambda: service.worker.running == service.worker.waiting == 0)
    assert "anyexperts_clients_gone_total" in send(url, "GET", "/metrics")[2]


def test_health_and_metrics(url, client):
    assert send(url, "GET", "/health")[::2] == (200, {"status": "ok"})
    counted = lambda page: float(re.search(r"^anyexperts_prompt_tokens_total (.*)$", page, re.MULTILINE)[1])  # noqa: E731
    before = counted(send(url, "GET", "/metrics")[2])
    ask(client, (1, 2), 3, None)
    page = send(url, "GET", "/metrics")[2]
    assert counted(page) == before + 2
    for name in ("requests_total", "completion_tokens_total", "real_experts_total", "first_token_seconds_bucket"):
        assert f"anyexperts_{name}" in page
    assert "anyexperts_slots 4.0" in page


@pytest.fixture(scope="module")
def small(served):
    """A server with a key and no queue."""
    from anyexperts_jax.serve.app import Limits
    from anyexperts_jax.serve.run import in_thread, make_service

    small_service = make_service(served, slots=4, length=96, limits=Limits(queue=0, seconds=5), api_key="secret")
    with in_thread(small_service) as url:
        yield small_service, url


def test_requests_need_the_api_key(small):
    _, url = small
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Bearer ß"}):
        status, _, answer = send(url, "GET", "/v1/models", headers={k: v.encode() for k, v in headers.items()})
        assert status == 401
        assert answer["error"]["code"] == "invalid_api_key"
    assert send(url, "GET", "/v1/models", headers={"authorization": "Bearer secret"})[0] == 200
    assert send(url, "GET", "/health")[0] == 200


def test_metrics_do_not_count_the_warm_up(small):
    page = send(small[1], "GET", "/metrics", headers={"authorization": "Bearer secret"})[2]
    assert "anyexperts_prompt_tokens_total 0.0" in page


def test_a_full_queue_is_429_and_a_timeout_504(small):
    small_service, url = small
    key = {"authorization": "Bearer secret"}
    assert send(url, "POST", "/v1/completions", TEXT | {"prompt": ["a"] * 5}, key)[0] == 429
    submit = small_service.engine.submit

    def submit_as_if_long_ago(ticket):
        ticket.arrived -= 10
        submit(ticket)

    small_service.engine.submit = submit_as_if_long_ago
    try:
        status, _, answer = send(url, "POST", "/v1/completions", TEXT, key)
    finally:
        small_service.engine.submit = submit
    assert (status, answer["error"]["code"]) == (504, "timeout")


def test_after_an_engine_error_the_next_request_is_answered(small):
    small_service, url = small
    key, step = {"authorization": "Bearer secret"}, small_service.engine.step

    def broken():
        step()
        raise RuntimeError("out of\nmemory")

    small_service.engine.step = broken
    try:
        status, _, answer = send(url, "POST", "/v1/completions", TEXT | {"max_tokens": 20}, key)
    finally:
        small_service.engine.step = step
    assert status == 503
    assert answer["error"]["message"] == "a step failed and its requests with it: out of memory"
    assert send(url, "POST", "/v1/completions", TEXT, key)[0] == 200
    assert "anyexperts_engine_restarts_total 1.0" in send(url, "GET", "/metrics", headers=key)[2]

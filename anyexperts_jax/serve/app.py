"""The HTTP shell: reads request bodies, submits jobs to the engine, writes responses.

Parsing of requests and building of response bodies is in `openai_requests` and `openai_answers`.
"""

import asyncio
import dataclasses
import functools
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from anyexperts_jax.core.errors import UserError, comma_list, require, shown
from anyexperts_jax.serve.engine import Engine, Event, Failed, Finished, Job, Progress, Ticket, Token
from anyexperts_jax.serve.metrics import Metrics
from anyexperts_jax.serve.model import ServedModel
from anyexperts_jax.serve.openai_answers import Choices, as_json, error_body, model_body, usage_body
from anyexperts_jax.serve.openai_requests import Asked, FieldError, Kind, read_request
from anyexperts_jax.serve.slots import row_budget
from anyexperts_jax.serve.usage import Usage
from anyexperts_jax.serve.worker import QueueFullError, StoppingError, Worker

OPEN_PATHS = ("/health",)  # need no API key


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request and of the queue."""

    body_bytes: int = 8 * 2**20  # of the body, media included
    queue: int = 64  # requests that wait for a slot
    seconds: float = 600.0  # from the request's arrival to its last token
    upload_seconds: float = 30.0  # to receive the body


class HttpError(Exception):
    """Makes the server answer the request with this status and error message."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclasses.dataclass(frozen=True, eq=False)
class Service:
    """The state that all endpoints share."""

    model: ServedModel
    engine: Engine
    worker: Worker
    metrics: Metrics
    limits: Limits = Limits()
    api_key: str | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


def make_app(service: Service) -> Starlette:
    """Builds the application: /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics."""
    endpoints: tuple[tuple[str, str, Callable[[Service, Request], Awaitable[Response]]], ...] = (
        ("/health", "GET", _health),
        ("/metrics", "GET", _metrics),
        ("/v1/models", "GET", _models),
        ("/v1/models/{name:path}", "GET", _model),
        ("/v1/completions", "POST", functools.partial(_completions, "text")),
        ("/v1/chat/completions", "POST", functools.partial(_completions, "chat")),
    )
    routes = [
        Route(path, functools.partial(_answered, service, path, endpoint), methods=[method])
        for path, method, endpoint in endpoints
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: functools.partial(_no_such_path, service)})


async def _answered(
    service: Service, path: str, endpoint: Callable[[Service, Request], Awaitable[Response]], request: Request
) -> Response:
    """Returns the endpoint's response, or its `HttpError` as one; counts both in the metrics."""
    try:
        if path not in OPEN_PATHS:
            _require_key(service, request)
        response = await endpoint(service, request)
    except HttpError as error:
        body = error_body(error.status, error.message, error.param, error.code)
        headers = {"retry-after": "1"} if error.status in (429, 503) else None
        response = _json(body, error.status, headers)
    service.metrics.answered(path, response.status_code)
    return response


async def _no_such_path(service: Service, request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    service.metrics.answered("other", error.status_code)
    what = f"{request.method} {request.url.path[:200]}"
    return _json(error_body(error.status_code, f"{what}: {error.detail}"), error.status_code, error.headers)


def _require_key(service: Service, request: Request) -> None:
    if service.api_key is None:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    matches = hmac.compare_digest(key.strip().encode("utf-8", "replace"), service.api_key.encode("utf-8"))
    if scheme.lower() != "bearer" or not matches:
        raise HttpError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")


async def _health(service: Service, request: Request) -> Response:
    state = service.worker.state
    return _json({"status": state}, 200 if state == "ok" else 503)


async def _metrics(service: Service, request: Request) -> Response:
    page, kind = service.metrics.text()
    return Response(page, headers={"content-type": kind})


async def _models(service: Service, request: Request) -> Response:
    names = (service.model.name, *service.model.adapters)
    return _json({"object": "list", "data": [_served(service, name) for name in names]})


async def _model(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    _adapter_of(service, name)
    return _json(_served(service, name))


def _served(service: Service, name: str) -> dict[str, Any]:
    media = ["text", *service.model.reader.media]
    return model_body(name, service.created, max_model_len=service.engine.length, modalities=media)


def _adapter_of(service: Service, name: str) -> str | None:
    """The adapter that a request's model stands for; None: the base alone."""
    own, adapters = service.model.name, service.model.adapters
    if name != own and name not in adapters:
        message = f"the model {shown(name)} is not served here; valid: {comma_list([own, *adapters])}"
        raise HttpError(404, message, "model", "model_not_found")
    return None if name == own else name


async def _completions(kind: Kind, service: Service, request: Request) -> Response:
    body = await _read_json(service.limits, request)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event | None]]()
    try:
        asked = read_request(kind, body)
        adapter = _adapter_of(service, asked.model)
        tickets = await asyncio.to_thread(_make_tickets, service, asked, adapter, _event_sender(loop, events))
        service.worker.submit(tickets)
    except UserError as error:
        raise HttpError(400, str(error), error.field if isinstance(error, FieldError) else None) from error
    except QueueFullError as error:
        raise HttpError(429, f"{service.limits.queue} requests wait already; try again later") from error
    except StoppingError as error:
        raise HttpError(503, f"the server takes no more requests: it is {error}") from error
    watcher = asyncio.create_task(_watch_disconnect(service, request, tickets, events))
    answer = _Answer(service, asked, tickets, events, watcher=watcher)
    if asked.stream:
        return StreamingResponse(answer.chunks(), media_type="text/event-stream", headers={"cache-control": "no-store"})
    return await answer.whole()


async def _read_json(limits: Limits, request: Request) -> Any:
    """Reads a request's body, within the limits of size and time, and parses it as JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, f"content-type {shown(kind)}; send application/json")
    taken = bytearray()
    too_large = f"the body is larger than the server's {limits.body_bytes} bytes"
    try:
        async with asyncio.timeout(limits.upload_seconds):
            async for part in request.stream():
                taken += part
                if len(taken) > limits.body_bytes:
                    raise HttpError(413, too_large)
    except TimeoutError as error:
        raise HttpError(408, f"the body took more than {limits.upload_seconds:g} seconds") from error
    try:
        return json.loads(taken, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}"[:300]) from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _event_sender(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Any]") -> Callable[[int, Event], None]:
    """Returns a function that passes an event from the engine's thread to the event loop.

    Once the loop is closed nobody waits for events, and they are discarded.
    """

    def tell(index: int, event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return tell


def _make_tickets(
    service: Service, asked: Asked, adapter: str | None, tell: Callable[[int, Event], None]
) -> list[Ticket]:
    """Makes one job for each answer the request asks for, and checks it against the model."""
    model, reader = service.model, service.model.reader
    try:
        budget = row_budget(model.base, model.weights.config, asked.budget)
    except UserError as error:
        raise FieldError(str(error), "budget") from error
    now = time.monotonic()
    tickets: list[Ticket] = []
    for given in asked.prompts:
        read = reader.chat if asked.kind == "chat" else reader.text if isinstance(given, str) else reader.ids
        prompt = read(given)
        room = service.engine.length - len(prompt.tokens)
        require(room > 0, f"the prompt has {len(prompt.tokens)} tokens, a slot {service.engine.length} positions")
        for again in range(asked.n):
            job = Job(
                prompt,
                room if asked.max_tokens is None else asked.max_tokens,
                budget,
                functools.partial(tell, len(tickets)),
                sampling=asked.sampling,
                seed=(asked.seed + again) % 2**32,
                stop=asked.stop,
                tells_logprobs=asked.logprobs is not None,
                seconds=service.limits.seconds,
                adapter=adapter,
            )
            service.engine.check(job)
            tickets.append(Ticket(job, now))
    return tickets


async def _watch_disconnect(
    service: Service, request: Request, tickets: list[Ticket], events: "asyncio.Queue[Any]"
) -> None:
    """Waits until the client disconnects, then frees its slots and ends the wait for its events."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    service.worker.cancel(tickets)
    service.metrics.client_gone()
    events.put_nowait((-1, None))


class _Answer:
    """The answer to one request, sent whole or as a stream while the engine makes it."""

    def __init__(
        self,
        service: Service,
        asked: Asked,
        tickets: list[Ticket],
        events: "asyncio.Queue[Any]",
        watcher: "asyncio.Task[None]",
    ) -> None:
        self._service, self._asked, self._tickets, self._events = service, asked, tickets, events
        self._watcher = watcher
        self._usages: list[Usage | None] = [None] * len(tickets)
        prefix = "chatcmpl" if asked.kind == "chat" else "cmpl"
        id = f"{prefix}-{uuid.uuid4().hex}"
        self._choices = Choices(asked, service.model.tokenizer, id, int(time.time()))

    async def whole(self) -> Response:
        texts, tokens = ["" for _ in self._tickets], list[list[Token]]([] for _ in self._tickets)
        reasons = ["" for _ in self._tickets]
        async for index, event in self._receive():
            if isinstance(event, Failed):
                raise HttpError(504 if event.reason == "timeout" else 503, event.message, code=event.reason)
            texts[index] += event.text
            if isinstance(event, Progress):
                tokens[index].append(event.token)
            else:
                reasons[index] = event.reason
        if not all(reasons):
            return Response(status_code=499)  # the client has disconnected
        return _json({**self._choices.whole(texts, tokens, reasons), "usage": self._usage()})

    async def chunks(self) -> AsyncIterator[bytes]:
        if self._asked.kind == "chat":
            for index in range(len(self._tickets)):
                yield _as_server_event(self._choices.chunk(index, None, []))
        async for index, event in self._receive():
            if isinstance(event, Failed):
                status = 504 if event.reason == "timeout" else 503
                yield _as_server_event(error_body(status, event.message, code=event.reason))
                return
            if isinstance(event, Finished):
                if event.text:
                    yield _as_server_event(self._choices.chunk(index, event.text, []))
                yield _as_server_event(self._choices.chunk(index, "", [], event.reason))
            elif event.text or self._asked.logprobs is not None:
                yield _as_server_event(self._choices.chunk(index, event.text, [event.token]))
        if None in self._usages:
            return
        if self._asked.streams_usage:
            yield _as_server_event(self._choices.bare([], usage=self._usage()))
        yield b"data: [DONE]\n\n"

    async def _receive(self) -> AsyncIterator[tuple[int, Event]]:
        """Yields events until all answers are finished, one fails or the client disconnects; then frees the slots."""
        try:
            while None in self._usages:
                index, event = await self._events.get()
                if event is None:
                    return
                if isinstance(event, Finished):
                    self._usages[index] = event.usage
                yield index, event
        finally:
            self._watcher.cancel()
            if None in self._usages:
                self._service.worker.cancel(self._tickets)

    def _usage(self) -> dict[str, Any]:
        usages = [usage for usage in self._usages if usage is not None]
        return usage_body(usages, len(self._asked.prompts), self._asked.budget)


def _as_server_event(value: dict[str, Any]) -> bytes:
    return b"data: " + as_json(value) + b"\n\n"


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(as_json(value), status, headers=headers, media_type="application/json")

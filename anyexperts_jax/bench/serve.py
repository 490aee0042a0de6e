"""Puts the server under load from several clients, and compares it with a plain loop of transformers.

Every request is first sent alone. Under load its answer must be the same, token for token.
"""

import concurrent.futures
import dataclasses
import http.client
import importlib.util
import itertools
import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.bench.output import environment, markdown, write_files
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.serve.app import Limits
from anyexperts_jax.serve.model import ServedModel
from anyexperts_jax.serve.run import in_thread, make_service

SPREAD = 0.5  # of the logarithm of lengths: two thirds are within a factor of 1.65 of the median


@dataclasses.dataclass(frozen=True)
class Load:
    """The requests of the clients, and the size of the server."""

    clients: tuple[int, ...] = (1, 4, 16)
    requests: int = 32  # for each number of clients
    prompt: int = 48  # median tokens of a prompt
    answer: int = 24  # median tokens of an answer
    slots: int = 8
    length: int = 256  # positions of a slot
    budgets: tuple[float, ...] = ()  # requests take them in turn; (): the model's own
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError if there is no client or no request."""
        require(bool(self.clients) and min(self.clients) >= 1, f"clients={self.clients} must be numbers >= 1")
        require(self.requests >= 1, f"requests={self.requests} must be >= 1")


@dataclasses.dataclass(frozen=True)
class ServeSpeed:
    """The results for one number of clients. Ratios are relative to the first number."""

    clients: int
    requests: int
    lost: int  # requests without an answer
    mixed_up: int  # answers that differ from those of single requests
    first_token_ms: float  # median time from the request
    between_tokens_ms: float  # median over tokens
    tokens_per_second: float  # all answers' tokens, over the time from the first request to the last answer
    throughput_ratio: float
    first_token_ratio: float
    between_tokens_ratio: float
    peak_megabytes: float  # memory of the process, clients included
    plain_ratio: float | None  # tokens per second over the plain loop's; None: transformers is not installed


@dataclasses.dataclass(frozen=True)
class ServeBench:
    environment: dict[str, Any]
    load: Load
    speeds: tuple[ServeSpeed, ...]


@dataclasses.dataclass(frozen=True)
class _Request:
    prompt: list[int]
    answer: int
    budget: float | None


@dataclasses.dataclass(frozen=True)
class _Answer:
    tokens: list[str]
    first: float
    between: list[float]


def bench_serve(model: ServedModel, load: Load, note: Callable[[str], None] = lambda line: None) -> ServeBench:
    """Measures each number of clients on the same requests.

    Raises:
      UserError: if the model or the server cannot take the requests.
    """
    made_with = environment(1)
    asked = requests_of(load, model.weights.config.vocab_size, model.longest)
    limits = Limits(queue=max(load.clients) * 2)
    plain = plain_loop(model, asked, note)
    service = make_service(model, slots=load.slots, length=min(load.length, model.longest), limits=limits, note=note)
    speeds: list[ServeSpeed] = []
    with in_thread(service) as url:
        note("every request alone")
        alone = [_ask(url, model.name, one) for one in asked]
        for clients in load.clients:
            note(f"{clients} clients")
            began = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(clients) as pool:
                got = list(pool.map(lambda one: _ask(url, model.name, one), asked))
            seconds = time.perf_counter() - began
            speeds.append(_speed(clients, got, alone, seconds, first=speeds[0] if speeds else None, plain=plain))
    return ServeBench(made_with, load, tuple(speeds))


def requests_of(load: Load, vocab_size: int, longest: int) -> list[_Request]:
    """Draws prompts of random ids, with log-normal lengths cut to what a slot holds."""
    random = np.random.default_rng(load.seed)
    room = min(load.length, longest)
    found = []
    for number in range(load.requests):
        lengths = np.exp(random.normal(np.log([load.prompt, load.answer]), SPREAD)).round().astype(int)
        answer = int(np.clip(lengths[1], 1, room // 2))
        prompt = int(np.clip(lengths[0], 1, room - answer))
        budget = load.budgets[number % len(load.budgets)] if load.budgets else None
        found.append(_Request(random.integers(0, vocab_size, prompt).tolist(), answer, budget))
    return found


def plain_loop(model: ServedModel, asked: Sequence[_Request], note: Callable[[str], None]) -> float | None:
    """Returns the tokens per second of transformers' `generate`, one request at a time; None if it cannot run."""
    folder = model.path
    installed = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
    if not installed or folder is None or not (folder / "model.safetensors").is_file():
        return None
    import torch
    from transformers import AutoModelForCausalLM

    note("the plain loop of transformers")
    peer = AutoModelForCausalLM.from_pretrained(folder).eval()
    written, seconds = 0, 0.0
    with torch.no_grad():
        for number, one in enumerate((asked[0], *asked)):  # runs the first request twice, to warm up
            began = time.perf_counter()
            ids = torch.tensor([one.prompt])
            out = peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=one.answer, do_sample=False, pad_token_id=0
            )
            if number:
                seconds += time.perf_counter() - began
                written += out.shape[1] - len(one.prompt)
    return written / seconds


def _ask(url: str, name: str, asked: _Request) -> _Answer | None:
    """Sends one request and reads the stream; None if the answer does not reach its end."""
    body = {"model": name, "prompt": asked.prompt, "max_tokens": asked.answer, "temperature": 0, "logprobs": 0}
    body |= {"stream": True} | ({} if asked.budget is None else {"budget": asked.budget})
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
    began = time.perf_counter()
    times, tokens, ended = list[float](), list[str](), False
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        for line in connection.getresponse():
            if line.strip() == b"data: [DONE]":
                ended = True
            elif line.startswith(b"data: "):
                (choice,) = json.loads(line[6:]).get("choices") or ({"logprobs": None},)
                new = (choice["logprobs"] or {}).get("tokens", [])
                tokens += new
                times += [time.perf_counter()] * len(new)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    first = times[0] - began if times else float("nan")
    between = [later - earlier for earlier, later in itertools.pairwise(times)]
    return _Answer(tokens, first, between) if ended else None


def _speed(
    clients: int,
    got: Sequence[_Answer | None],
    alone: Sequence[_Answer | None],
    seconds: float,
    *,
    first: ServeSpeed | None,
    plain: float | None,
) -> ServeSpeed:
    answered = [one for one in got if one is not None]
    pairs = [(one, other) for one, other in zip(got, alone, strict=True) if one is not None and other is not None]
    speed = sum(len(one.tokens) for one in answered) / seconds
    firsts = _median([one.first for one in answered if one.tokens])
    between = _median([gap for one in answered for gap in one.between])
    base = (speed, firsts, between)
    if first is not None:
        base = (first.tokens_per_second, first.first_token_ms / 1000, first.between_tokens_ms / 1000)
    return ServeSpeed(
        clients,
        requests=len(got),
        lost=len(got) - len(answered),
        mixed_up=sum(one.tokens != other.tokens for one, other in pairs),
        first_token_ms=firsts * 1000,
        between_tokens_ms=between * 1000,
        tokens_per_second=speed,
        throughput_ratio=speed / base[0],
        first_token_ratio=firsts / base[1],
        between_tokens_ratio=between / base[2],
        peak_megabytes=_peak_megabytes(),
        plain_ratio=None if plain is None else speed / plain,
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _peak_megabytes() -> float:
    """Returns the peak memory of this process so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def serve_table(bench: ServeBench) -> TextTable:
    """Returns the table of results by number of clients, as ratios over the first row."""
    columns = ("clients", "requests", "lost", "mixed up", "throughput", "first token", "between tokens", "MB")
    rows = [
        (
            str(one.clients),
            str(one.requests),
            str(one.lost),
            str(one.mixed_up),
            f"x{one.throughput_ratio:.2f}",
            f"x{one.first_token_ratio:.2f}",
            f"x{one.between_tokens_ratio:.2f}",
            f"{one.peak_megabytes:.0f}",
            "-" if one.plain_ratio is None else f"x{one.plain_ratio:.2f}",
        )
        for one in bench.speeds
    ]
    title = f"the server with {bench.load.slots} slots; ratios over the first row's"
    return TextTable(title, (*columns, "over transformers"), tuple(rows))


def write_bench(bench: ServeBench, folder: pathlib.Path, command: str) -> tuple[pathlib.Path, ...]:
    """Writes bench_serve.json, .csv and .md."""
    text = markdown("The server under load", command, bench.environment, [serve_table(bench)])
    return write_files(folder, "bench_serve", command, bench, bench.speeds, text=text)

"""Puts the server under load from several clients, and compares it with a plain loop of transformers.

Every request is first sent alone. Under load its answer must be the same, token for token. If the model has adapters,
every load is also measured with requests that take the adapters in turn, beside that of the base alone.
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.bench.output import environment, markdown, write_files
from anyexperts_jax.core.errors import one_line, require
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
    rounds: int = 1  # each measures every load once; medians are reported

    def __post_init__(self) -> None:
        """Raises UserError if there is no client, no request or no round."""
        require(bool(self.clients) and min(self.clients) >= 1, f"clients={self.clients} must be numbers >= 1")
        require(self.requests >= 1, f"requests={self.requests} must be >= 1")
        require(self.rounds >= 1, f"rounds={self.rounds} must be >= 1")


@dataclasses.dataclass(frozen=True)
class ServeSpeed:
    """The results for one number of clients. Ratios are medians over rounds, relative to the first row of the same
    round.
    """

    clients: int
    adapters: int  # that the requests take in turn; 0: the base alone
    requests: int
    lost: int  # requests without an answer, of all rounds
    mixed_up: int  # answers that differ from those of single requests, of all rounds
    first_token_ms: float  # median time from the request
    between_tokens_ms: float  # median over tokens
    tokens_per_second: float  # all answers' tokens, over the time from the first request to the last answer
    throughput_ratio: float
    first_token_ratio: float
    between_tokens_ratio: float
    peak_megabytes: float  # memory of the process, clients included
    base_ratio: float  # throughput over that of the base alone with as many clients
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


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One load, once."""

    answers: list[_Answer | None]
    seconds: float

    @property
    def answered(self) -> list[_Answer]:
        return [one for one in self.answers if one is not None]

    @property
    def speed(self) -> float:
        return sum(len(one.tokens) for one in self.answered) / self.seconds

    @property
    def first(self) -> float:
        return _median([one.first for one in self.answered if one.tokens])

    @property
    def between(self) -> float:
        return _median([gap for one in self.answered for gap in one.between])


def bench_serve(model: ServedModel, load: Load, note: Callable[[str], None] = lambda line: None) -> ServeBench:
    """Measures each number of clients on the same requests, once a round.

    Raises:
      UserError: if the model or the server cannot take the requests.
    """
    made_with = environment(load.rounds)
    asked = requests_of(load, model.weights.config.vocab_size, model.longest)
    limits = Limits(queue=max(load.clients) * 2)
    plain = plain_loop(model, asked, note)
    service = make_service(model, slots=load.slots, length=min(load.length, model.longest), limits=limits, note=note)
    kinds = {0: [model.name], **({len(model.adapters): list(model.adapters)} if model.adapters else {})}
    loads = [(clients, adapters) for clients in load.clients for adapters in kinds]
    passes: dict[tuple[int, int], list[_Pass]] = {one: [] for one in loads}
    plains, peaks = list[float](), dict[tuple[int, int], float]()
    with in_thread(service) as url:
        note("every request alone")
        alone = {adapters: _send(url, names, asked, 1).answers for adapters, names in kinds.items()}
        for number in range(load.rounds):
            if plain is not None:
                note(f"round {number + 1}: the plain loop of transformers")
                plains.append(plain())
            for clients, adapters in loads:
                with_them = f", {adapters} adapters" if adapters else ""
                note(f"round {number + 1}: {clients} clients{with_them}")
                passes[clients, adapters].append(_send(url, kinds[adapters], asked, clients))
                peaks[clients, adapters] = _peak_megabytes()
    speeds = [_speed(one, passes, alone[one[1]], plains=plains, peak_megabytes=peaks[one]) for one in loads]
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


def plain_loop(
    model: ServedModel, asked: Sequence[_Request], note: Callable[[str], None]
) -> Callable[[], float] | None:
    """Returns a function that runs transformers' `generate` on one request at a time and returns its tokens per second.

    None if transformers is not installed or cannot read the model, or the model is no folder of safetensors.
    """
    folder = model.path
    installed = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
    if not installed or folder is None or not (folder / "model.safetensors").is_file():
        return None
    import torch
    from transformers import AutoModelForCausalLM

    try:
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        note(f"no plain loop beside it: transformers cannot read {folder}: {one_line(error)}")
        return None

    def answer(one: _Request) -> int:
        ids = torch.tensor([one.prompt])
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        return int(peer.generate(ids, max_new_tokens=one.answer, **how).shape[1]) - len(one.prompt)

    def run() -> float:
        with torch.no_grad():
            answer(asked[0])  # warms up
            began = time.perf_counter()
            written = sum(map(answer, asked))
            return written / (time.perf_counter() - began)

    return run


def _send(url: str, names: Sequence[str], asked: Sequence[_Request], clients: int) -> _Pass:
    """Sends all requests from a number of clients; they take the models in turn."""
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda one: _ask(url, names[one[0] % len(names)], one[1]), enumerate(asked)))
    return _Pass(answers, time.perf_counter() - began)


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
    load: tuple[int, int],
    passes: Mapping[tuple[int, int], Sequence[_Pass]],
    alone: Sequence[_Answer | None],
    *,
    plains: Sequence[float],
    peak_megabytes: float,
) -> ServeSpeed:
    """Returns the results of one load, (clients, adapters), over all rounds."""
    clients, adapters = load
    own, first, base = passes[load], next(iter(passes.values())), passes[clients, 0]
    pairs = [
        (one, other)
        for each in own
        for one, other in zip(each.answers, alone, strict=True)
        if one is not None and other is not None
    ]

    def ratio(value: Callable[[_Pass], float], others: Sequence[_Pass]) -> float:
        return _median([value(one) / value(other) for one, other in zip(own, others, strict=True)])

    return ServeSpeed(
        clients,
        adapters,
        requests=len(alone),
        lost=sum(one is None for each in own for one in each.answers),
        mixed_up=sum(one.tokens != other.tokens for one, other in pairs),
        first_token_ms=_median([one.first for one in own]) * 1000,
        between_tokens_ms=_median([one.between for one in own]) * 1000,
        tokens_per_second=_median([one.speed for one in own]),
        throughput_ratio=ratio(lambda one: one.speed, first),
        first_token_ratio=ratio(lambda one: one.first, first),
        between_tokens_ratio=ratio(lambda one: one.between, first),
        peak_megabytes=peak_megabytes,
        base_ratio=ratio(lambda one: one.speed, base),
        plain_ratio=_median([one.speed / plain for one, plain in zip(own, plains, strict=True)]) if plains else None,
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _peak_megabytes() -> float:
    """Returns the peak memory of this process so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def serve_table(bench: ServeBench) -> TextTable:
    """Returns the table of results of the base alone, as ratios over the first row."""
    columns = ("clients", "requests", "lost", "mixed up", "throughput", "first token", "between tokens", "MiB")
    rows = [
        (
            *_counts(one),
            f"x{one.throughput_ratio:.2f}",
            f"x{one.first_token_ratio:.2f}",
            f"x{one.between_tokens_ratio:.2f}",
            f"{one.peak_megabytes:.0f}",
            "-" if one.plain_ratio is None else f"x{one.plain_ratio:.2f}",
        )
        for one in bench.speeds
        if not one.adapters
    ]
    title = f"the server with {bench.load.slots} slots; ratios over the first row's"
    return TextTable(title, (*columns, "over transformers"), tuple(rows))


def adapter_table(bench: ServeBench) -> TextTable | None:
    """Returns the table of requests that take adapters in turn, relative to the base alone; None without any."""
    rows = [(*_counts(one), str(one.adapters), f"x{one.base_ratio:.2f}") for one in bench.speeds if one.adapters]
    columns = ("clients", "requests", "lost", "mixed up", "adapters", "throughput")
    return TextTable("adapters in turn; throughput over the base's", columns, tuple(rows)) if rows else None


def _counts(speed: ServeSpeed) -> tuple[str, str, str, str]:
    return str(speed.clients), str(speed.requests), str(speed.lost), str(speed.mixed_up)


def serve_tables(bench: ServeBench) -> list[TextTable]:
    """Returns all tables of the results."""
    return [table for table in (serve_table(bench), adapter_table(bench)) if table is not None]


def write_bench(bench: ServeBench, folder: pathlib.Path, command: str) -> tuple[pathlib.Path, ...]:
    """Writes bench_serve.json, .csv and .md."""
    text = markdown("The server under load", command, bench.environment, serve_tables(bench))
    return write_files(folder, "bench_serve", command, bench, bench.speeds, text=text)

"""Continuous batching over a fixed number of slots.

A request takes a free slot, its prompt is prefilled in pieces, then it gets one token per step until it is finished
and the slot is free again. Each step reads at most one piece of one prompt, so a long prompt delays the running answers
by one piece at a time and not by its whole length.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.models.generate import dropless
from anyexperts_jax.models.sample import GREEDY, Sampling
from anyexperts_jax.nn.stack import StackCache
from anyexperts_jax.pretrained.decode import Weights
from anyexperts_jax.pretrained.media import readable_kinds
from anyexperts_jax.pretrained.placing import Placed
from anyexperts_jax.pretrained.prompts import TextStream
from anyexperts_jax.serve.slots import (
    Chosen,
    RowBudget,
    Rows,
    Static,
    extend_slot,
    make_rows,
    prefill_slot,
    row_budget,
    show_slot,
    slot_cache,
    step_slots,
)
from anyexperts_jax.serve.usage import Spent, Usage
from anyexperts_jax.tokenizers.base import Tokenizer

PIECES = (16, 128)  # widths of prefill pieces; each is a compiled program


class Prompt(NamedTuple):
    """The tokens of a prompt. A prompt with media also has a `batch`: the one row that the model reads."""

    tokens: tuple[int, ...]
    batch: Batch | None = None  # of a run
    placed: Placed | None = None  # of a published model


class Token(NamedTuple):
    """A token of an answer. `logprob` and `top`, the most likely tokens, are filled in if the request asks for them."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Progress(NamedTuple):
    """A new token, and the new text that later tokens cannot change."""

    text: str
    token: Token


class Finished(NamedTuple):
    """The last piece of the text, and why the answer ended."""

    text: str
    reason: Literal["stop", "length"]
    usage: Usage


class Failed(NamedTuple):
    """The answer ended early: its time is up, or an engine step failed."""

    reason: Literal["timeout", "engine"]
    message: str


Event = Progress | Finished | Failed


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One answer that a request asks for. `tell` gets its events, in the engine's thread."""

    prompt: Prompt
    max_new_tokens: int
    budget: RowBudget
    tell: Callable[[Event], None]
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: tuple[str, ...] = ()
    tells_logprobs: bool = False
    adapter: str | None = None  # by name; None: only the base
    seconds: float = float("inf")  # allowed from the request's arrival


@dataclasses.dataclass(eq=False)
class Ticket:
    """A submitted job. Setting `cancelled` frees its slot before the next step."""

    job: Job
    arrived: float
    cancelled: bool = False

    @property
    def late(self) -> bool:
        return time.monotonic() - self.arrived > self.job.seconds


@dataclasses.dataclass(eq=False)
class _Slot:
    ticket: Ticket
    stream: TextStream
    spent: Spent
    filled: int = 0  # positions written to the cache
    lead: float = 0.0  # by how much rotary positions lag behind them, once media have been read
    tokens: list[int] = dataclasses.field(default_factory=list)
    last_told: float = 0.0

    @property
    def is_prefilling(self) -> bool:
        return not self.tokens

    @property
    def draw(self) -> tuple[Sampling, int, int]:
        return self.ticket.job.sampling, self.ticket.job.seed, len(self.tokens)


Watch = Callable[[str, float], None]


class Engine:
    """Runs requests in slots over one cache. Not thread-safe: one thread must make all calls to `submit` and `step`.

    Args:
      weights: the model, with a window that has room for the largest budget.
      adapters: the same model with one adapter each, by the name that jobs give.
      slots: how many requests run at once.
      length: positions of a slot, shared by prompt and answer.
      watch: called with (metric, amount); the metrics are "first_token_seconds", "between_tokens_seconds",
        "prompt_tokens", "completion_tokens" and "real_experts".
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        *,
        slots: int,
        length: int,
        watch: Watch,
        adapters: Mapping[str, Weights] | None = None,
    ) -> None:
        config = dropless(weights.config)
        require(length <= config.max_length, f"length={length} is more than the model's {config.max_length} positions")
        self.length, self._watch = length, watch
        self._config, self._has_towers = config, bool(readable_kinds(config))
        models: list[tuple[str | None, Weights]] = [(None, weights), *(adapters or {}).items()]
        self._arguments = {name: _arguments(own) for name, own in models}
        self._tokenizer, self._stop_ids = tokenizer, frozenset(stop_ids)
        self._waiting = collections.deque[Ticket]()
        self._slots: list[_Slot | None] = [None] * slots
        self._rest = row_budget(config, config, None)
        self._cache = self._empty_cache(slots)

    @property
    def running(self) -> int:
        return sum(slot is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def free(self) -> int:
        return len(self._slots) - self.running

    @property
    def busy(self) -> bool:
        return bool(self.running or self._waiting)

    def piece_lengths(self) -> list[int]:
        """Prompt lengths which together run every compiled program for text; the warm-up submits one of each."""
        needing = [1, *(width + 1 for width in PIECES[:-1])]
        return [length for length in needing if length + 2 <= self.length] or [1]

    def check(self, job: Job) -> None:
        """Raises what `submit` would raise; may be called from any thread."""
        check_fits(job.prompt.tokens, job.max_new_tokens, self.length, self._config.vocab_size)

    def submit(self, ticket: Ticket) -> None:
        """Appends a job to the queue.

        Raises:
          UserError: if the prompt is empty, holds an id outside the vocabulary, or does not fit into a slot together
            with its answer.
        """
        self.check(ticket.job)
        self._waiting.append(ticket)

    def step(self) -> bool:
        """Prefills one piece of one prompt, and decodes one token in every slot whose prompt is read.

        Returns False if there was nothing to do.
        """
        self._drop()
        for number, slot in enumerate(self._slots):
            if slot is None and self._waiting:
                ticket = self._waiting.popleft()
                stream = TextStream(self._tokenizer, ticket.job.stop)
                self._slots[number] = _Slot(ticket, stream, Spent.nothing(self._config.stack.num_moe_layers))
        prefilled = self._prefill_piece()
        return self._decode_step() or prefilled

    def fail_all(self, message: str, waiting: bool = False) -> None:
        """Fails all running jobs (with `waiting` also the queued ones) and starts again with an empty cache.

        Called after a step that raised: the step donated the cache, so its buffers may be gone.
        """
        failed = [slot.ticket for slot in self._slots if slot is not None]
        if waiting:
            failed += self._waiting
            self._waiting.clear()
        for ticket in failed:
            ticket.job.tell(Failed("engine", message))
        self._slots = [None] * len(self._slots)
        self._cache = self._empty_cache(len(self._slots))

    def _empty_cache(self, slots: int) -> StackCache:
        """Returns a cache placed as the compiled programs return it; JAX would recompile them for another placement."""
        cache: StackCache = slot_cache(self._config, slots, self.length)
        devices = {device for leaf in jax.tree.leaves(self._arguments[None][1]) for device in leaf.devices()}
        return jax.device_put(cache, devices.pop()) if len(devices) == 1 else cache

    def _drop(self) -> None:
        """Removes jobs that were cancelled or whose time is up, from the slots and from the queue."""
        for number, slot in enumerate(self._slots):
            if slot is not None and self._is_over(slot.ticket):
                self._slots[number] = None
        self._waiting = collections.deque(ticket for ticket in self._waiting if not self._is_over(ticket))

    def _is_over(self, ticket: Ticket) -> bool:
        if ticket.late and not ticket.cancelled:
            ticket.job.tell(Failed("timeout", f"the answer took more than {ticket.job.seconds:g} seconds"))
        return ticket.cancelled or ticket.late

    def _prefill_piece(self) -> bool:
        """Prefills the next piece of the prompt that arrived first; False if no slot is prefilling."""
        prefilling = [
            (slot.ticket.arrived, number) for number, slot in enumerate(self._slots) if slot and slot.is_prefilling
        ]
        if not prefilling:
            return False
        number = min(prefilling)[1]
        slot = self._slots[number]
        assert slot is not None
        job, place = slot.ticket.job, jnp.int32(number)
        arguments = self._arguments[job.adapter]
        if job.prompt.placed is not None:
            piece, placed = job.prompt.tokens, job.prompt.placed
            tokens_1T = np.zeros(placed.media.row_BT.shape, np.int32)
            tokens_1T[0, : len(piece)] = piece
            given = (self._rows(tokens_1T, [(slot, len(piece))]), placed.media)
            chosen, self._cache = show_slot(*arguments, given, self._cache, place)
            slot.lead = float(placed.lead_B[0])
        elif job.prompt.batch is None:
            rest = job.prompt.tokens[slot.filled :]
            width = next((width for width in PIECES if width >= len(rest)), PIECES[-1])
            piece = rest[:width]
            tokens_1T = np.zeros((1, width), np.int32)
            tokens_1T[0, : len(piece)] = piece
            rows = self._rows(tokens_1T, [(slot, len(piece))])
            chosen, self._cache = extend_slot(*arguments, rows, self._cache, place)
        else:
            piece = job.prompt.tokens
            rows = self._rows(np.zeros((1, 1), np.int32), [(slot, len(piece))])
            chosen, self._cache = prefill_slot(*arguments, (job.prompt.batch, rows), self._cache, place)
        chosen = jax.device_get(chosen)  # indexing an array on the device would compile another program
        slot.filled += len(piece)
        slot.spent = slot.spent.plus(Spent(chosen.real_BLM[0], chosen.read_BM[0]))
        if slot.filled == len(job.prompt.tokens):
            self._watch("first_token_seconds", time.monotonic() - slot.ticket.arrived)
            self._add_token(number, slot, _token(chosen, 0, job.tells_logprobs))
        return True

    def _decode_step(self) -> bool:
        """Decodes one token in every slot whose prompt is read; False if there is none.

        All slots go through the program, so that one compiled shape serves whichever slots are live: the others rest
        with length 0, and their tokens are ignored. The program runs once for each adapter in use, while the slots of
        other adapters rest.
        """
        live = {n: slot for n, slot in enumerate(self._slots) if slot is not None and not slot.is_prefilling}
        for adapter in dict.fromkeys(slot.ticket.job.adapter for slot in live.values()):
            self._decode_with(adapter, {n: slot for n, slot in live.items() if slot.ticket.job.adapter == adapter})
        return bool(live)

    def _decode_with(self, adapter: str | None, live: Mapping[int, _Slot]) -> None:
        tokens_B1 = np.zeros((len(self._slots), 1), np.int32)
        for number, slot in live.items():
            tokens_B1[number, 0] = slot.tokens[-1]
        rows = self._rows(tokens_B1, [(slot, int(number in live)) for number, slot in enumerate(self._slots)])
        chosen, self._cache = step_slots(*self._arguments[adapter], rows, self._cache)
        chosen = jax.device_get(chosen)
        for number, slot in live.items():
            slot.filled += 1
            slot.spent = slot.spent.plus(Spent(chosen.real_BLM[number], chosen.read_BM[number]))
            self._watch("between_tokens_seconds", time.monotonic() - slot.last_told)
            self._add_token(number, slot, _token(chosen, number, slot.ticket.job.tells_logprobs))

    def _rows(self, tokens_BT: np.ndarray, slots: Sequence[tuple[_Slot | None, int]]) -> Rows:
        own = [slot for slot, _ in slots]
        return make_rows(
            tokens_BT,
            [slot.filled if slot else 0 for slot in own],
            [length for _, length in slots],
            [slot.ticket.job.budget if slot else self._rest for slot in own],
            draws=[slot.draw if slot else (GREEDY, 0, 0) for slot in own],
            tells=any(slot.ticket.job.tells_logprobs for slot in own if slot),
            leads=[slot.lead if slot else 0.0 for slot in own] if self._has_towers else None,
        )

    def _add_token(self, number: int, slot: _Slot, token: Token) -> None:
        """Appends a token to a slot's answer, and frees the slot if the answer is finished."""
        job = slot.ticket.job
        slot.tokens.append(token.id)
        slot.last_told = time.monotonic()
        if token.id in self._stop_ids:
            return self._finish(number, slot, "stop")
        job.tell(Progress(slot.stream.add(token.id), token))
        if slot.stream.stopped:
            self._finish(number, slot, "stop")
        elif len(slot.tokens) == job.max_new_tokens:
            self._finish(number, slot, "length")

    def _finish(self, number: int, slot: _Slot, reason: Literal["stop", "length"]) -> None:
        self._slots[number] = None
        prompt, answer = len(slot.ticket.job.prompt.tokens), len(slot.tokens)
        usage = Usage(prompt, answer, slot.spent)
        real = int(slot.spent.real_LM.sum())
        for name, amount in (("prompt_tokens", prompt), ("completion_tokens", answer), ("real_experts", real)):
            self._watch(name, amount)
        slot.ticket.job.tell(Finished(slot.stream.rest(), reason, usage))


def _arguments(weights: Weights) -> tuple[Static, Any, Array | None]:
    """What every program takes first."""
    return (dropless(weights.config), weights.placement), weights.params, weights.router_bias_LC


def check_fits(prompt: Sequence[int], max_new_tokens: int, length: int, vocab_size: int) -> None:
    """Checks that a prompt and its answer fit into a slot, and that the model has the prompt's ids.

    Raises:
      UserError: naming the lengths or the id that does not fit.
    """
    require(len(prompt) > 0, "the prompt is empty; give at least one token")
    require(max_new_tokens >= 1, f"max_tokens={max_new_tokens} must be >= 1")
    require(
        len(prompt) + max_new_tokens <= length,
        f"the prompt has {len(prompt)} tokens and max_tokens={max_new_tokens}, together more than the {length} "
        "positions of a slot; shorten one of them",
    )
    low, high = min(prompt), max(prompt)
    unknown = low if low < 0 else high
    require(
        low >= 0 and high < vocab_size, f"the prompt holds the id {unknown}; the model has ids 0 to {vocab_size - 1}"
    )


def _token(chosen: Chosen, row: int, tells: bool) -> Token:
    token = int(chosen.tokens_B[row])
    if not tells:
        return Token(token, 0.0, ())
    ids, logprobs = (np.asarray(values[row]).tolist() for values in (chosen.top_ids_BX, chosen.top_logprobs_BX))
    return Token(token, float(chosen.logprobs_B[row]), tuple(zip(ids, logprobs, strict=True)))

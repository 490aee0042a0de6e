"""`Runner`: what the model classes of all harnesses share. It answers prompts, scores continuations, counts experts."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from anyexperts_jax.core.errors import require
from anyexperts_jax.harness.score import Pair, Used, log_likelihood_after, log_likelihoods
from anyexperts_jax.models.sample import Sampling
from anyexperts_jax.serve.engine import Engine, Event, Finished, Job, Progress, Prompt, Ticket
from anyexperts_jax.serve.model import ServedModel
from anyexperts_jax.serve.slots import row_budget
from anyexperts_jax.serve.usage import Usage

MAX_NEW_TOKENS = 256  # longest answer, unless the task sets its own
_KINDS: dict[str, type] = {"temperature": float, "top_p": float, "top_k": int, "min_p": float}
_NEUTRAL = {"repetition_penalty": 1.0, "num_beams": 1}  # accepted at these values alone, which ask for nothing
_IGNORED = ("image_aspect_ratio",)  # LLaVA's own; a model's preprocessing decides it
_LENGTHS = ("max_gen_toks", "max_new_tokens")


class Options(NamedTuple):
    """How a task wants its answers."""

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


class Answer(NamedTuple):
    """An answer, and what it used."""

    text: str
    usage: Usage


def read_options(asked: Mapping[str, Any], length: int) -> Options:
    """Reads the generation_kwargs of a task.

    Args:
      length: positions that prompt and answer share.

    Raises:
      UserError: for an option that cannot be honoured, or an answer longer than the positions.
    """
    how = {name: value for name, value in asked.items() if value is not None and name not in _IGNORED}
    most = [(name, int(how.pop(name))) for name in _LENGTHS if name in how] or [(_LENGTHS[0], MAX_NEW_TOKENS)]
    stop = how.pop("until", [])
    stop = [stop] if isinstance(stop, str) else stop
    samples = bool(how.pop("do_sample", float(how.get("temperature", 0)) > 0))
    for name, neutral in _NEUTRAL.items():
        value = how.pop(name, neutral)
        require(value == neutral, f"the task asks for {name} in generation_kwargs ({value}), which is not supported")
    values = {name: kind(how.pop(name)) for name, kind in _KINDS.items() if name in how}
    require(not how, f"the task asks for {', '.join(how)} in generation_kwargs, which is not supported")
    name, longest = most[0]
    require(longest < length, f"{name}={longest} leaves no room in {length} positions")
    sampling = Sampling(**values) if samples and values.get("temperature", 1.0) > 0 else Sampling()
    return Options(longest, sampling, tuple(text for text in stop if text))


class Runner:
    """A model at one budget. `used` counts the real experts over all requests, `seconds` the time they took.

    Args:
      budget: real experts per token; None: the model's own window.
      rows: batch size.
      length: longest sequence; None: the model's positions.

    Raises:
      UserError: if the model cannot reach the budget, or has fewer positions.
    """

    def __init__(self, model: ServedModel, budget: float | None, *, rows: int = 8, length: int | None = None) -> None:
        self.model, self._rows = model, rows
        self._budget = row_budget(model.base, model.weights.config, budget)
        self.length = model.longest if length is None else length
        require(2 <= self.length <= model.longest, f"length={self.length} must be from 2 to {model.longest} positions")
        self.used, self.seconds = Used(model.base.stack.num_moe_layers), 0.0

    def answers(self, asked: Iterable[tuple[Prompt, Options]]) -> list[Answer]:
        """Answers prompts, as many at once as there are rows; takes each from `asked` only when a row is free.

        Raises:
          UserError: if a prompt and its answer do not fit into the positions.
        """
        began = time.perf_counter()
        model, waiting = self.model, enumerate(asked)
        engine = Engine(
            model.weights,
            model.tokenizer,
            model.stop_ids,
            slots=self._rows,
            length=self.length,
            watch=lambda name, amount: None,
        )
        texts, usages = list[str](), dict[int, Usage]()

        def tell(number: int, event: Event) -> None:
            if isinstance(event, Progress | Finished):
                texts[number] += event.text
            if isinstance(event, Finished):
                usages[number] = event.usage

        while True:
            while engine.free > engine.waiting and (one := next(waiting, None)) is not None:
                number, (prompt, options) = one
                texts.append("")
                job = self._job(prompt, options, number, lambda event, number=number: tell(number, event))
                engine.submit(Ticket(job, 0.0))
            if not engine.step():
                break
        for usage in usages.values():
            self.used.add(usage.spent)
        self.seconds += time.perf_counter() - began
        return [Answer(text, usages[number]) for number, text in enumerate(texts)]

    def _job(self, prompt: Prompt, options: Options, seed: int, tell: Any) -> Job:
        return Job(
            prompt,
            options.max_new_tokens,
            self._budget,
            tell,
            sampling=options.sampling,
            seed=seed,
            stop=options.stop,
        )

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Returns for each continuation its log likelihood, and whether greedy decoding would produce it."""
        began = time.perf_counter()
        how: dict[str, Any] = {"rows": self._rows, "longest": self.length, "used": self.used}
        found = log_likelihoods(self.model.weights, pairs, self._budget, **how)
        self.seconds += time.perf_counter() - began
        return found

    def score_after(self, prompt: Prompt, continuation: Sequence[int]) -> tuple[float, bool]:
        """The same for one continuation of a prompt, which may have media.

        Raises:
          UserError: if a prompt with media and its continuation do not fit into the model's positions.
        """
        if prompt.batch is None and prompt.placed is None:
            return self.score([Pair(prompt.tokens, tuple(continuation))])[0]
        began = time.perf_counter()
        found = log_likelihood_after(self.model.weights, prompt, continuation, self._budget, self.used)
        self.seconds += time.perf_counter() - began
        return found

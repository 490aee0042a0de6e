"""`HarnessLM`, lm-eval's model interface over this package. Import it only if the extra `harness` is installed."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from anyexperts_jax.core.errors import require
from anyexperts_jax.harness.score import Pair, Used, log_likelihoods
from anyexperts_jax.models.sample import Sampling
from anyexperts_jax.serve.engine import Engine, Event, Finished, Job, Progress, Prompt, Ticket
from anyexperts_jax.serve.model import ServedModel
from anyexperts_jax.serve.slots import row_budget
from anyexperts_jax.tokenizers.chat import ChatTemplate

MAX_NEW_TOKENS = 256  # longest answer, unless the task sets its own


class HarnessLM(TemplateLM):
    """A model at one budget. `used` counts the real experts over all requests.

    Args:
      budget: real experts per token; None: the model's own window.
      rows: batch size, for scoring and for generation.
      length: longest sequence; None: the model's positions.

    Raises:
      UserError: if the model cannot reach the budget, or has fewer positions.
    """

    def __init__(self, model: ServedModel, budget: float | None, *, rows: int = 8, length: int | None = None) -> None:
        super().__init__()
        self._model, self._rows = model, rows
        self._budget = row_budget(model.base, model.weights.config, budget)
        self.max_length = model.longest if length is None else length
        require(
            2 <= self.max_length <= model.longest,
            f"length={self.max_length} must be from 2 to {model.longest} positions",
        )
        self.used = Used(model.base.stack.num_moe_layers)

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.special.eos[0]

    @property
    def prefix_token_id(self) -> int:
        """The token put before a text that has no context."""
        return self._model.tokenizer.special.begin

    @property
    def tokenizer_name(self) -> str:
        return f"{self._model.tokenizer.name} {self._model.tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes a text that may contain special tokens, such as a rendered conversation."""
        ids: list[int] = self._model.tokenizer.encode_rendered(string).ids_T.tolist()
        leading = list(self._model.leading_ids)
        if add_special_tokens is False or (leading and ids[: len(leading)] == leading):
            return ids
        return leading + ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation. Without a generation prompt it ends with its last message, to be continued there."""
        text = ChatTemplate.of(self._model.tokenizer).write(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        require(last in text, "the chat template changes the last message, so no answer can continue it")
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if not chat_template:
            return None
        name = () if chat_template is True else (str(chat_template),)
        return ChatTemplate.of(self._model.tokenizer, *name).source

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log likelihood of whole texts, scored in consecutive windows of `max_length` positions."""
        windows, owners = list[Pair](), list[int]()
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(Pair(*map(tuple, make_disjoint_window(pair))))
                owners.append(number)
        found = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._score(windows), strict=True):
            found[number] += logprob
        for request, logprob in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates an answer to each request, up to the first of its stop texts."""
        texts = ["" for _ in requests]
        engine = Engine(
            self._model.weights,
            self._model.tokenizer,
            self._model.stop_ids,
            slots=self._rows,
            length=self.max_length,
            watch=lambda name, amount: None,
        )

        def tell(number: int, event: Event) -> None:
            if isinstance(event, Progress | Finished):
                texts[number] += event.text
            if isinstance(event, Finished):
                tokens = event.usage.prompt_tokens + event.usage.completion_tokens - 1
                self.used.add([real * tokens for real in event.usage.real_by_layer], tokens)

        for number, request in enumerate(requests):
            engine.submit(Ticket(self._job(number, *request.args, tell=tell), 0.0))
        while engine.step():
            continue
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _job(self, number: int, context: str, asked: dict[str, Any], *, tell: Any) -> Job:
        how: dict[str, Any] = dict(normalize_gen_kwargs(asked, MAX_NEW_TOKENS))
        stop, most = how.pop("until", None) or [], how.pop("max_gen_toks")
        samples = bool(how.pop("do_sample", False))
        known = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}
        values = {name: kind(how.pop(name)) for name, kind in known.items() if how.get(name) is not None}
        unknown = [name for name in how if how[name] is not None]
        require(not unknown, f"the task asks for {', '.join(unknown)} in generation_kwargs, which is not supported")
        require(values.get("repetition_penalty", 1.0) == 1.0, "the task asks for a repetition_penalty: not supported")
        require(most < self.max_length, f"max_gen_toks={most} leaves no room in {self.max_length} positions")
        prompt = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        sampling = Sampling(**values) if samples else Sampling()
        return Job(
            Prompt(tuple(prompt)),
            most,
            self._budget,
            lambda event: tell(number, event),
            sampling=sampling,
            seed=number,
            stop=tuple(text for text in stop if text),
        )

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        found = self._score([Pair(tuple(context), tuple(continuation)) for _, context, continuation in requests])
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        return log_likelihoods(
            self._model.weights, pairs, self._budget, rows=self._rows, longest=self.max_length, used=self.used
        )

"""`HarnessLM`, lm-eval's model interface over this package. Import it only if the extra `harness` is installed."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from anyexperts_jax.core.errors import require
from anyexperts_jax.harness.runner import MAX_NEW_TOKENS, Options, Runner, read_options
from anyexperts_jax.harness.score import Pair, Used
from anyexperts_jax.serve.engine import Prompt
from anyexperts_jax.serve.model import ServedModel
from anyexperts_jax.tokenizers.chat import ChatTemplate


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
        self._model, self._runner = model, Runner(model, budget, rows=rows, length=length)
        self.max_length = self._runner.length

    @property
    def used(self) -> Used:
        return self._runner.used

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
        for number, (logprob, _) in zip(owners, self._runner.score(windows), strict=True):
            found[number] += logprob
        for request, logprob in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates an answer to each request, up to the first of its stop texts."""
        asked = (self._asked(*request.args) for request in requests)
        texts = [answer.text for answer in self._runner.answers(asked)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _asked(self, context: str, asked: dict[str, Any]) -> tuple[Prompt, Options]:
        options = read_options(normalize_gen_kwargs(asked, MAX_NEW_TOKENS), self.max_length)
        room = self.max_length - options.max_new_tokens
        return Prompt(tuple(self.tok_encode(context)[-room:] or [self.prefix_token_id])), options

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        found = self._runner.score([Pair(tuple(context), tuple(continuation)) for _, context, continuation in requests])
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

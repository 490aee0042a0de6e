"""`HarnessLMM`, lmms-eval's model interface over this package. Import it only where lmms-eval is installed."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string

from anyexperts_jax.core.errors import UserError, require, require_one_of, shown
from anyexperts_jax.harness.media import conversation_of
from anyexperts_jax.harness.runner import Options, Runner, read_options
from anyexperts_jax.harness.score import Used
from anyexperts_jax.serve.engine import Prompt
from anyexperts_jax.serve.model import ServedModel, load_served

_ARGUMENTS = ("pretrained", "budget", "checkpoint", "adapter", "length", "batch_size", "device")


class HarnessLMM(lmms):
    """A model at one budget, for tasks that ask by conversations. `used` counts the real experts over all requests.

    Args:
      budget: real experts per token; None: the model's own window.
      rows: batch size.
      length: longest sequence; None: the model's positions.

    Raises:
      UserError: if the model reads text alone, cannot reach the budget, or has fewer positions.
    """

    is_simple = False

    def __init__(self, model: ServedModel, budget: float | None, *, rows: int = 8, length: int | None = None) -> None:
        super().__init__()
        require_media(model)
        self._runner, self._budget = Runner(model, budget, rows=rows, length=length), budget

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessLMM":
        """Loads the model that lmms-eval's --model_args names.

        Raises:
          UserError: if an argument is unknown or no path is given, or for what `load_served` refuses.
        """
        beside = {name: value for name, value in (additional_config or {}).items() if value is not None}
        entries = [entry for entry in arg_string.split(",") if entry.strip()]
        pairs = all("=" in entry for entry in entries)
        require(pairs, f"--model_args {shown(arg_string)} must read NAME=VALUE,NAME=VALUE")
        given = {**simple_parse_args_string(arg_string), **beside}
        for name in given:
            require_one_of("--model_args", name, _ARGUMENTS)
        require("pretrained" in given, "--model_args needs pretrained=PATH, a run or a published checkpoint")
        device = given.get("device")
        require(device is None, f"device={shown(device)}: JAX takes the devices it finds; leave --device out")
        rows = _whole("batch_size", given.get("batch_size", 1))
        length = None if "length" not in given else _whole("length", given["length"])
        budget = None if "budget" not in given else _number("budget", given["budget"])
        adapters = {"adapter": pathlib.Path(given["adapter"])} if "adapter" in given else {}
        path, checkpoint = pathlib.Path(str(given["pretrained"])), given.get("checkpoint", "best")
        model = load_served(path, checkpoint, budget, adapters=adapters)
        model = model.with_adapter("adapter") if adapters else model
        return cls(model, budget, rows=rows, length=length)

    @property
    def used(self) -> Used:
        return self._runner.used

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Generates an answer to each request, up to the first of its stop texts."""
        began = self._runner.seconds
        answers = self._runner.answers(self._asked(requests))
        tokens = sum(answer.usage.completion_tokens for answer in answers)
        self._report(tokens, self._runner.seconds - began)
        return [
            GenerationResult(answer.text, TokenCounts(answer.usage.prompt_tokens, answer.usage.completion_tokens))
            for answer in answers
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        raise UserError("conversations are for generation only; lmms-eval asks for likelihoods with --force_simple")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise UserError("the task asks in several rounds (generate_until_multi_round), which is not supported")

    def generate_visual_cot(self, requests: Sequence[Instance]) -> list[str]:
        raise UserError("the task asks for pictures that the model draws (visual_cot), which is not supported")

    def _asked(self, requests: Sequence[Instance]) -> Iterator[tuple[Prompt, Options]]:
        for request in requests:
            _, messages, asked, *document = request.args
            yield self._prompt(messages(self._document(*document)), document), self._options(asked)

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _prompt(self, messages: Sequence[Mapping[str, Any]], document: Sequence[Any]) -> Prompt:
        number, task, _ = document
        return self._runner.model.reader.conversation(conversation_of(messages, f"{task}, document {number}"))

    def _options(self, asked: Mapping[str, Any]) -> Options:
        return read_options(asked, self._runner.length)

    def _report(self, tokens: int, seconds: float) -> None:
        """Adds the budget and the experts used to what lmms-eval writes beside the scores, numbers alone."""
        experts = {} if self._budget is None else {"budget": self._budget}
        experts |= {f"real_experts_layer_{i}": real for i, real in enumerate(self.used.by_layer)}
        for name, real_L in self.used.by_modality.items():
            experts[f"real_experts_{name}"] = sum(real_L) / len(real_L)
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, experts)


class SimpleHarnessLMM(HarnessLMM):
    """The same for tasks that ask by a text and media that stand before it, likelihoods included."""

    is_simple = True

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Returns the loss of each continuation, and whether greedy decoding would produce it.

        Tasks of lmms-eval prefer the lowest: its models return the mean loss per token here, not a log likelihood.
        Version 0.7.3 turns a bare pair into its text, which it cannot score; it keeps what a `GenerationResult` holds.
        """
        return [GenerationResult(self._scored(request)) for request in requests]

    def _scored(self, request: Instance) -> tuple[float, bool]:
        context, continuation, *rest = request.args
        require(len(rest) == 4, "the task asks for likelihoods without a question (acc_mutual_info): not supported")
        visual, *document = rest
        if callable(continuation):
            continuation = continuation(self._document(*document))
        prompt = self._prompt(self._turn(context, visual, document), document)
        ids = self._runner.model.tokenizer.encode(str(continuation)).ids_T.tolist()
        require(len(ids) > 0, f"{document[1]}, document {document[0]}: an answer is empty, so it has no likelihood")
        logprob, likeliest = self._runner.score_after(prompt, ids)
        return -logprob / len(ids), likeliest

    def _asked(self, requests: Sequence[Instance]) -> Iterator[tuple[Prompt, Options]]:
        for request in requests:
            context, asked, visual, *document = request.args
            yield self._prompt(self._turn(context, visual, document), document), self._options(asked)

    def _turn(self, context: str, visual: Any, document: Sequence[Any]) -> list[dict[str, Any]]:
        media = [ConfigurableMessagesTask._visual_to_content(one) for one in visual(self._document(*document)) or []]
        return [{"role": "user", "content": [*media, {"type": "text", "text": context}]}]


def require_media(model: ServedModel) -> None:
    """Checks that a model reads more than text.

    Raises:
      UserError: if it does not.
    """
    require(
        bool(model.reader.media),
        f"{model.name} reads text alone, but lmms-eval's tasks show pictures, videos and sounds; use lm-eval's tasks",
    )


def _number(name: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = 0.0
    require(0 < found < math.inf, f"{name}={value} must be a number > 0")
    return found


def _whole(name: str, value: Any) -> int:
    found = _number(name, value) if str(value).isdigit() else 0.0
    require(found >= 1, f"{name}={value} must be a whole number > 0")
    return int(found)

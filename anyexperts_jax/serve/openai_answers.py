"""OpenAI's answers: bodies, chunks of a stream, errors. Beside its fields, `usage` says the real experts a token."""

import json
import math
from collections.abc import Sequence
from typing import Any

from anyexperts_jax.serve.engine import Token, Usage
from anyexperts_jax.serve.openai_requests import Asked
from anyexperts_jax.tokenizers.base import Tokenizer

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def as_json(value: Any) -> bytes:
    """ASCII alone: a message may repeat half a surrogate pair of the request's."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": " ".join(message.splitlines()), "type": kind, "param": param, "code": code}}


def model_body(name: str, created: int, **more: Any) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "anyexperts", **more}


def usage_body(usages: Sequence[Usage], prompts: int, budget: float | None) -> dict[str, Any]:
    """What a request took. A prompt that several answers share counts once.

    `real_experts_per_token` is the mean over MoE layers and over the tokens that the model read, prompt and answer.
    """
    shared = len(usages) // prompts
    prompt_tokens = sum(usage.prompt_tokens for usage in usages[::shared])
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    tokens = [usage.prompt_tokens + usage.completion_tokens - 1 for usage in usages]
    body: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    weighed = [usage.real_experts * count for usage, count in zip(usages, tokens, strict=True)]
    if not math.isnan(sum(weighed)):
        body |= {"real_experts_per_token": round(sum(weighed) / sum(tokens), 4), "budget": budget}
    return body


class Choices:
    """Builds the choices of one answer, whole or in chunks."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer, id: str, created: int) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._chat = asked.kind == "chat"
        self._frame = {"id": id, "created": created, "model": asked.model}
        self._offsets: dict[int, int] = {}

    def whole(self, texts: Sequence[str], tokens: Sequence[list[Token]], reasons: Sequence[str]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = []
        for i, (text, own, reason) in enumerate(zip(texts, tokens, reasons, strict=True)):
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            choices.append({"index": i, **said, "logprobs": self._logprobs(i, own), "finish_reason": reason})
        return {**self._frame, "object": kind, "choices": choices}

    def chunk(self, index: int, text: str | None, tokens: list[Token], reason: str | None = None) -> dict[str, Any]:
        """A part of a stream. text: None begins a chat's answer."""
        if not self._chat:
            said: dict[str, Any] = {"text": text or ""}
        elif text is None:
            said = {"delta": {"role": "assistant", "content": ""}}
        else:
            said = {"delta": {"content": text} if text else {}}
        choice = {"index": index, **said, "logprobs": self._logprobs(index, tokens), "finish_reason": reason}
        return self.bare([choice])

    def bare(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._frame, "object": kind, "choices": choices, **more}

    def _logprobs(self, index: int, tokens: list[Token]) -> dict[str, Any] | None:
        asked = self._asked.logprobs
        if asked is None:
            return None
        if self._chat:
            return {"content": [{**self._told(t.id, t.logprob), "top_logprobs": self._top(t)} for t in tokens]}
        texts = [self._text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._text(id): p for id, p in reversed(token.top[:asked])} for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> list[dict[str, Any]]:
        assert self._asked.logprobs is not None
        return [self._told(id, logprob) for id, logprob in token.top[: self._asked.logprobs]]

    def _told(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._text(id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}

    def _text(self, id: int) -> str:
        return self._tokenizer.decode([id])

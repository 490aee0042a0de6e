"""Builds response bodies, stream chunks and errors of OpenAI's API. `usage` also has the real experts per token."""

import json
import math
from collections.abc import Sequence
from typing import Any

from anyexperts_jax.serve.engine import Token
from anyexperts_jax.serve.openai_requests import Asked
from anyexperts_jax.serve.usage import Usage
from anyexperts_jax.tokenizers.base import Tokenizer

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def as_json(value: Any) -> bytes:
    """Encodes a value as ASCII JSON; a message may quote a lone surrogate of the request, which UTF-8 cannot encode."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns an error body that OpenAI's clients understand."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": " ".join(message.splitlines()), "type": kind, "param": param, "code": code}}


def model_body(name: str, created: int, **more: Any) -> dict[str, Any]:
    """Returns an entry of /v1/models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "anyexperts", **more}


def usage_body(usages: Sequence[Usage], prompts: int, budget: float | None) -> dict[str, Any]:
    """Returns the usage of a request. A prompt that several answers share counts once.

    `real_experts_per_token` is the mean over MoE layers and over the tokens that the model read. The last token of an
    answer is not read.
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
        """Returns the body of an answer that is not streamed."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = []
        for i, (text, own, reason) in enumerate(zip(texts, tokens, reasons, strict=True)):
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            choices.append({"index": i, **content, "logprobs": self._logprobs(i, own), "finish_reason": reason})
        return {**self._frame, "object": kind, "choices": choices}

    def chunk(self, index: int, text: str | None, tokens: list[Token], reason: str | None = None) -> dict[str, Any]:
        """Returns one chunk of a stream. `text=None` makes the chunk that begins a chat's answer."""
        if not self._chat:
            content: dict[str, Any] = {"text": text or ""}
        elif text is None:
            content = {"delta": {"role": "assistant", "content": ""}}
        else:
            content = {"delta": {"content": text} if text else {}}
        choice = {"index": index, **content, "logprobs": self._logprobs(index, tokens), "finish_reason": reason}
        return self.bare([choice])

    def bare(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        """Returns a chunk that holds these choices and further fields."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._frame, "object": kind, "choices": choices, **more}

    def _logprobs(self, index: int, tokens: list[Token]) -> dict[str, Any] | None:
        asked = self._asked.logprobs
        if asked is None:
            return None
        if self._chat:
            return {"content": [{**self._token_entry(t.id, t.logprob), "top_logprobs": self._top(t)} for t in tokens]}
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
        return [self._token_entry(id, logprob) for id, logprob in token.top[: self._asked.logprobs]]

    def _token_entry(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._text(id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}

    def _text(self, id: int) -> str:
        return self._tokenizer.decode([id])

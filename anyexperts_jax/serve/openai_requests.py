"""Reads and checks OpenAI's completion requests.

A field that this server does not support is refused, unless its value asks for nothing, as `frequency_penalty: 0` does:
an answer that silently ignored a field would be wrong.
"""

import dataclasses
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of, shown
from anyexperts_jax.models.sample import Sampling
from anyexperts_jax.serve.slots import MOST_ALTERNATIVES

Kind = Literal["chat", "text"]
MOST_CHOICES = 16  # answers to one request: prompts times n
MOST_STOPS = 16
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, OpenAI's default; a chat may fill its slot

_ANY = object()
# Unsupported fields, with the values that ask for nothing and are accepted; _ANY: the field is always ignored.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "user": (_ANY,),
    "metadata": (_ANY,),
    "safety_identifier": (_ANY,),
    "prompt_cache_key": (_ANY,),
}
_SHARED = {"model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stream"}
_SHARED |= {"stream_options", "logprobs", "budget"}
_OWN = {"chat": {"messages", "max_completion_tokens", "top_logprobs"}, "text": {"prompt"}}


class FieldError(UserError):
    """An error in one field of a request; `field` becomes the error's `param`."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Asked:
    """A completion request, checked as far as possible without the model."""

    kind: Kind
    model: str
    prompts: tuple[Any, ...]  # texts, tuples of ids, or one list of messages
    n: int
    max_tokens: int | None
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None  # most likely tokens to report for each token; None: report no probabilities
    stream: bool
    streams_usage: bool
    budget: float | None


def read_request(kind: Kind, body: Any) -> Asked:
    """Reads a request's JSON.

    Raises:
      FieldError: if a field is unknown, unsupported or invalid; the message says what it must be.
    """
    if not isinstance(body, Mapping):
        raise FieldError(f"the body must be a JSON object, not {type(body).__name__}")
    given = {key: value for key, value in body.items() if value is not None}
    known = _SHARED | _OWN[kind]
    for name, value in given.items():
        if name in known:
            continue
        neutral = _NEUTRAL.get(name)
        if neutral is None:
            raise FieldError(f"{shown(name)} is no field of this request; valid: {comma_list(sorted(known))}", name)
        if neutral[0] is not _ANY and value not in neutral:
            raise FieldError(f"{name}={shown(value)} is not supported; leave it out", name)
    take = _Fields(given)
    alternatives = _logprobs(kind, take)
    asked = Asked(
        kind=kind,
        model=take.text("model"),
        prompts=take.checked("messages", _messages) if kind == "chat" else take.checked("prompt", _prompts),
        n=take.whole("n", 1, 1, MOST_CHOICES),
        max_tokens=_max_tokens(kind, take),
        sampling=_sampling(take),
        seed=take.whole("seed", secrets.randbits(32), 0, 2**32 - 1),
        stop=take.checked("stop", _stops, ()),
        logprobs=alternatives,
        stream=take.flag("stream"),
        streams_usage=take.checked("stream_options", _stream_options, False),
        budget=take.number("budget"),
    )
    choices = asked.n * len(asked.prompts)
    if choices > MOST_CHOICES:
        raise FieldError(f"{choices} answers are asked for, more than {MOST_CHOICES}; send several requests", "n")
    return asked


class _Fields:
    """Reads fields of a request and checks their types; a missing field has its default."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def text(self, name: str) -> str:
        return str(self.checked(name, _text))

    def flag(self, name: str) -> bool:
        return bool(self.checked(name, _flag, False))

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        value = self._given.get(name, default)
        valid = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        if not valid:
            raise FieldError(f"{name}={shown(value)} must be a whole number from {least} to {most}", name)
        return int(value)

    def number(self, name: str) -> float | None:
        value = self._given.get(name)
        if value is None:
            return None
        valid = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30
        if not valid or not math.isfinite(value):
            raise FieldError(f"{name}={shown(value)} must be a finite number", name)
        return float(value)

    def checked(self, name: str, read: Callable[[Any], Any], *default: Any) -> Any:
        if name not in self._given:
            if default:
                return default[0]
            raise FieldError(f"{name} is missing", name)
        try:
            return read(self._given[name])
        except UserError as error:
            raise FieldError(f"{name}: {error}", name) from error


def _text(value: Any) -> str:
    require(isinstance(value, str) and bool(value), f"{shown(value)} must be a text")
    return str(value)


def _flag(value: Any) -> bool:
    require(isinstance(value, bool), f"{shown(value)} must be true or false")
    return bool(value)


def _messages(value: Any) -> tuple[Any, ...]:
    valid = isinstance(value, list) and len(value) > 0 and all(isinstance(one, Mapping) for one in value)
    require(valid, f"{shown(value)} must be a list of objects with role and content, not an empty one")
    return (value,)


def _prompts(value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        return (value,)
    if _are_ids(value):
        return (tuple(value),)
    several = isinstance(value, list) and len(value) > 0
    valid = several and (all(isinstance(one, str) for one in value) or all(_are_ids(one) for one in value))
    require(valid, f"{shown(value)} must be a text, a list of token ids, or a list of either, not an empty one")
    require(len(value) <= MOST_CHOICES, f"{len(value)} prompts, more than {MOST_CHOICES}; send several requests")
    return tuple(one if isinstance(one, str) else tuple(one) for one in value)


def _are_ids(value: Any) -> bool:
    ids = isinstance(value, list) and len(value) > 0
    return ids and all(isinstance(one, int) and not isinstance(one, bool) and abs(one) < 2**31 for one in value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    valid = isinstance(stops, list) and all(isinstance(one, str) and one for one in stops)
    require(valid, f"{shown(value)} must be a text or a list of texts, none of them empty")
    require(len(stops) <= MOST_STOPS, f"{len(stops)} texts, more than {MOST_STOPS}")
    return tuple(stops)


def _stream_options(value: Any) -> bool:
    require(isinstance(value, Mapping), f"{shown(value)} must be an object")
    for name in value:
        require_one_of("field", name, ("include_usage", "include_obfuscation"))
    return _flag(value.get("include_usage", False))


def _max_tokens(kind: Kind, take: _Fields) -> int | None:
    most = 2**31 - 1
    if kind == "text":
        return take.whole("max_tokens", DEFAULT_MAX_TOKENS, 1, most)
    given = [
        take.whole(name, 0, 1 if name in take._given else 0, most) for name in ("max_tokens", "max_completion_tokens")
    ]
    asked = [amount for amount in given if amount]
    return min(asked) if asked else None


def _logprobs(kind: Kind, take: _Fields) -> int | None:
    if kind == "text":
        asked = take.whole("logprobs", -1, -1, MOST_ALTERNATIVES)
        return None if asked < 0 else asked
    alternatives = take.whole("top_logprobs", 0, 0, MOST_ALTERNATIVES)
    wanted = take.flag("logprobs")
    if alternatives and not wanted:
        raise FieldError(f"top_logprobs={alternatives} needs logprobs=true", "top_logprobs")
    return alternatives if wanted else None


def _sampling(take: _Fields) -> Sampling:
    values: dict[str, Sequence[float]] = {"temperature": (0, 2), "top_p": (0, 1), "min_p": (0, 1)}
    defaults = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
    found: dict[str, Any] = {"top_k": take.whole("top_k", 0, 0, 2**31 - 1)}
    for name, (least, most) in values.items():
        value = take.number(name)
        value = defaults[name] if value is None else value
        if not least <= value <= most:
            raise FieldError(f"{name}={value:g} must be from {least} to {most}", name)
        found[name] = value
    found["top_p"] = max(found["top_p"], 1e-6)  # sampling always keeps the most likely token, which is what 0 asks for
    found["temperature"] = 0.0 if found["temperature"] < 1e-5 else found["temperature"]
    found["min_p"] = 0.0 if found["min_p"] < 1e-30 else found["min_p"]
    return Sampling(**found)

"""Encodes prompts as a published model expects them, and decodes its tokens to text as they arrive."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.pretrained.media import Given, Shown
from anyexperts_jax.pretrained.pictures import listed
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.chat import ChatTemplate
from anyexperts_jax.tokenizers.files import parse_object
from anyexperts_jax.tokenizers.huggingface import CONFIG, MAIN, HuggingFaceTokenizer, require_library

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Messages  # a text to continue, or a conversation for the chat template


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt, shown: Shown | None = None) -> list[int]:
    """Encodes a prompt.

    A text is encoded as it is, after the ids that the tokenizer puts before every text. A conversation is rendered with
    the chat template, up to the beginning of the assistant's next turn.

    Args:
      shown: pictures, videos and sounds. They are put before a text, or where a conversation has parts for them.

    Raises:
      UserError: if the prompt is empty, or a conversation is given and the tokenizer has no chat template.
    """
    texts = shown.ids.texts(tokenizer) if shown is not None else {}
    if isinstance(prompt, str):
        before = "" if shown is None else "".join(shown.place_text(item, texts) for item in shown.items)
        places = tokenizer.encode_rendered(before).ids_T.tolist() if before else []
        found = [*leading_ids(tokenizer), *places, *tokenizer.encode(prompt).ids_T.tolist()]
        require(bool(found), "the prompt is empty; give at least one token")
        return found
    template = ChatTemplate.of(tokenizer)
    text = template.write(prompt, add_generation_prompt=True)
    text = text if shown is None else shown.fill(text, texts)
    return tokenizer.encode_rendered(text).ids_T.tolist()


def with_media(prompt: Prompt, given: Given, kinds: Sequence[str]) -> tuple[Prompt, Given]:
    """Returns a conversation with a part for each picture, video and sound, and the media in the order of the parts.

    Media without parts get parts at the beginning of the last message. A text is returned unchanged.

    Args:
      given: media given beside the prompt, by kind.
      kinds: the kinds that the model reads.

    Raises:
      UserError: if parts hold media and others are given too, the numbers of parts and media differ, or a part has
        another kind.
    """
    given = {kind: listed(f"{kind}s", own) for kind, own in given.items()}
    if isinstance(prompt, str):
        return prompt, given
    prompt = [_with_plain_sounds(message, f"message {number}") for number, message in enumerate(prompt)]
    held = media_in(prompt, kinds)
    found: dict[str, Sequence[Any]] = {}
    for kind, own in given.items():
        parts = held.get(kind, [])
        named, places = [value for value in parts if value is not None], len(parts)
        require(
            not (named and own) and len(named) in (0, places),
            f"the conversation has {places} parts of type {kind!r}, {len(named)} of them say which; "
            f"{len(own)} are given beside it: let all parts say which, or give all",
        )
        require(
            bool(named) or places in (0, len(own)),
            f"the conversation has {places} parts of type {kind!r}, but {len(own)} are given; give as many",
        )
        found[kind] = named or own
    missing = {kind: len(own) for kind, own in given.items() if own and not held.get(kind)}
    if not missing:
        return prompt, found
    last = dict(prompt[-1])
    content = last.get("content", "")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    last["content"] = [*({"type": kind} for kind, count in missing.items() for _ in range(count)), *texts]
    return [*prompt[:-1], last], found


def media_in(messages: Sequence[Any], kinds: Sequence[str]) -> dict[str, list[Any]]:
    """Returns the media in the parts of a conversation, by kind; None for a part that is only a placeholder.

    Args:
      kinds: the kinds that the model reads.

    Raises:
      UserError: if a part has another kind.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    readable = ", ".join(["text", *kinds[:-1]]) + f" and {kinds[-1]}"
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, Mapping) else None
            known = kind in (None, "text", *found)
            require(known, f"the prompt holds a part of type {kind!r}; the model reads {readable}")
            if kind in found:
                found[kind].append(part.get(kind))
    return found


def _with_plain_sounds(message: Any, where: str) -> Any:
    """Replaces a message's parts of type "input_audio", OpenAI's form of sounds, by parts of type "audio".

    Raises:
      UserError: if such a part has no base64 data.
    """
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        if not (isinstance(part, Mapping) and part.get("type") == "input_audio"):
            parts.append(part)
            continue
        held = part.get("input_audio")
        data = held.get("data") if isinstance(held, Mapping) else None
        require(isinstance(data, str) and bool(data), f"{where}: input_audio must be an object with data in base64")
        try:
            parts.append({"type": "audio", "audio": base64.b64decode(str(data), validate=True)})
        except ValueError as error:
            raise UserError(f"{where}: the data of input_audio is not base64: {one_line(error)}") from error
    return {**message, "content": parts}


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that the tokenizer's settings put before every text: none, or its begin-of-text id."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return []
    settings = parse_object(CONFIG, tokenizer.files[CONFIG]) if CONFIG in tokenizer.files else {}
    bos = tokenizer.special.bos
    if settings.get("add_bos_token") is True and bos is not None:
        return [bos]
    description = json.loads(tokenizer.files[MAIN])
    if settings.get("add_bos_token") is False or not description.get("post_processor"):
        return []
    found = require_library().Tokenizer.from_str(tokenizer.files[MAIN]).encode("", add_special_tokens=True).ids
    return [bos] if bos is not None and found[:1] == [bos] else []


class TextStream:
    """Decodes tokens that arrive one by one, and cuts the text before the first stop string.

    Text that later tokens may change is held back: an incomplete UTF-8 character, or the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        require(all(stop), "a stop string is empty")
        self._tokenizer, self._stop, self._ids, self._returned = tokenizer, tuple(stop), list[int](), 0
        self.text, self.stopped = "", False

    def add(self, token: int) -> str:
        """Adds a token; returns the new text that later tokens cannot change."""
        self._ids.append(token)
        self.text = self._tokenizer.decode(self._ids)
        places = [place for stop in self._stop if (place := self.text.find(stop)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True
            return self.rest()
        final = len(self.text.rstrip("\ufffd"))  # bytes of an incomplete character decode to U+FFFD
        for stop in self._stop:
            held = max((n for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
            final = min(final, len(self.text) - held)
        return self._take_until(final)

    def rest(self) -> str:
        """Returns the text that was held back, once no token follows."""
        return self._take_until(len(self.text))

    def _take_until(self, until: int) -> str:
        new = self.text[self._returned : max(until, self._returned)]
        self._returned = max(until, self._returned)
        return new


def require_text(prompt: Any) -> None:
    """Checks that a prompt has no picture, video or sound, for a model that reads only text.

    Raises:
      UserError: naming the part.
    """
    if isinstance(prompt, str):
        return
    for message in prompt:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in (None, "text"):
                raise UserError(f"the prompt holds a part of type {kind!r}, but the model reads text alone")

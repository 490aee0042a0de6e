"""Text to the tokens a published model expects, and its tokens back to text as they come."""

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
    """The ids of a prompt: a text as it is, with the ids that the tokenizer puts before one, or a conversation with
    what comes before the assistant's next turn.

    Args:
      shown: pictures, videos and sounds, which stand before a text, and in a conversation where it has parts for them.

    Raises:
      UserError: an empty prompt, or a conversation for a tokenizer without a template.
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
    """A conversation with a part for each picture, video and sound, and what its parts stand for, in their order.

    Where it has no parts for them, they go to the beginning of its last message. A text is left as it is.

    Args:
      given: media beside the prompt, by kind.
      kinds: those that the model reads.

    Raises:
      UserError: for parts that say what they stand for beside media that are given, too many or few of these, or a part
        of another kind.
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
    """What the parts of a conversation stand for beside text, by kind; None where a part does not say.

    Args:
      kinds: those that the model reads.

    Raises:
      UserError: for a part of another kind.
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
    """The message with its parts of type "input_audio", as OpenAI writes sounds, as parts of type "audio".

    Raises:
      UserError: for such a part without data in base64.
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
    """What the tokenizer's own settings put before every text: nothing, or the id that begins one."""
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
    """The text of tokens that come one by one, cut before the first stop string.

    A character whose bytes are not all there waits for the rest, and so does what may become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        require(all(stop), "a stop string is empty")
        self._tokenizer, self._stop, self._ids, self._told = tokenizer, tuple(stop), list[int](), 0
        self.text, self.stopped = "", False

    def add(self, token: int) -> str:
        """Takes a token and returns the text that is new and sure."""
        self._ids.append(token)
        self.text = self._tokenizer.decode(self._ids)
        places = [place for stop in self._stop if (place := self.text.find(stop)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True
            return self.rest()
        sure = len(self.text.rstrip("\ufffd"))
        for stop in self._stop:
            held = max((n for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
            sure = min(sure, len(self.text) - held)
        return self._tell(sure)

    def rest(self) -> str:
        """What is left to tell once no token follows."""
        return self._tell(len(self.text))

    def _tell(self, until: int) -> str:
        new = self.text[self._told : max(until, self._told)]
        self._told = max(until, self._told)
        return new


def require_text(prompt: Any) -> None:
    """Refuses a prompt with a picture, a video or a sound for a model of text.

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

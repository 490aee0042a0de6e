"""Reads a record of a file, in any of these schemas, as a conversation, an example or a document.

| columns | meaning |
|---|---|
| `messages` | a chat in transformers' and OpenAI's form: `{"role": ..., "content": text or a list of parts}` |
| `conversations` | LLaVA's form: `{"from": "human" or "gpt", "value": "<image>\\nWhat ..."}`, files in `image` |
| `question`, `answer` | one turn each; `image`, `audio` or `video` is put before the question |
| `chosen`, `rejected`, perhaps `prompt` | two answers to one prompt, each a text or messages: a preference |
| `text`, and one of `image`, `audio`, `video` | a transcript or caption of the medium |
| only `text` | a document: text without roles |

A medium is bytes, a path relative to the record's folder, a data: URL, an object with `bytes` or `path`, or numbers as
`data.decode` reads them. Unknown keys of messages are refused; other columns of a row are ignored.
"""

import base64
import binascii
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of
from anyexperts_jax.data.cells import level_of, text_of
from anyexperts_jax.data.config import Columns
from anyexperts_jax.data.conversation import (
    KINDS,
    Conversation,
    Document,
    Item,
    Kind,
    Medium,
    Message,
    Part,
    Text,
    joined,
    pixel_mask,
)
from anyexperts_jax.data.decode import decode_audio, decode_picture, decode_video
from anyexperts_jax.data.example import Example
from anyexperts_jax.tokenizers.chat import ASSISTANT, ROLES

_LLAVA_ROLES = {"human": "user", "gpt": ASSISTANT, **{role: role for role in ROLES}}
_PART_KEYS = {"type", "evidence", "text", "path", "url", "base64", "detail", *KINDS, "image_url", "input_audio"}
_PART_TYPES = ("text", *KINDS, "image_url", "input_audio")
_WANTED = (
    "messages, conversations, question and answer, chosen and rejected, an image, audio or video with a text, or text"
)
_DECODERS = {"image": decode_picture, "video": decode_video, "audio": decode_audio}


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """How `read_record` reads a record.

    Attributes:
      domain: the name of its source.
      source: its file and row.
      read: returns the bytes of a file that the record names; raises UserError if there is none.
      labels: the names of class labels, by column.
      as_examples: whether a question with at most one medium is read as an `Example`, which uses no chat template.
    """

    domain: str
    source: str
    read: Callable[[str], bytes]
    columns: Columns = dataclasses.field(default_factory=Columns)
    labels: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    as_examples: bool = False

    def column(self, row: Mapping[str, Any], name: str) -> str | None:
        """Returns the row's name of a column, the configured one first; None if the row has no value there."""
        for own in self.columns.names[name]:
            if row.get(own) is not None:
                return own
        return None

    def value(self, row: Mapping[str, Any], name: str) -> Any:
        own = self.column(row, name)
        return None if own is None else row[own]

    def text(self, row: Mapping[str, Any], name: str) -> str | None:
        """Returns a column's value as text."""
        own = self.column(row, name)
        if own is None:
            return None
        value = row[own]
        if isinstance(value, str) and own not in self.labels:  # most columns
            return value
        return text_of(value, list(self.labels[own]) if own in self.labels else None, own)


def read_record(row: Mapping[str, Any], reading: Reading) -> Item:
    """Reads a row, by its columns, as a document, a conversation or, if `reading` allows it, an example.

    Raises:
      UserError: naming what is missing, unknown or does not fit; the caller adds the place.
    """
    kind = reading.text(row, "question_type") or "any"
    level = level_of(reading.value(row, "level"), "the row")
    if reading.column(row, "chosen") is not None and reading.column(row, "rejected") is not None:
        chosen, rejected = (_answered(row, reading, name) for name in ("chosen", "rejected"))
        require(
            [_said(message) for message in chosen[:-1]] == [_said(message) for message in rejected[:-1]],
            "chosen and rejected differ before their last answers; a preference is between two answers to one prompt",
        )
        return Conversation(reading.domain, chosen, reading.source, kind, level, rejected=rejected[-1])
    media = _Given(row, reading)
    chat, turns = reading.value(row, "messages"), reading.value(row, "conversations")
    if chat is not None or turns is not None:
        listed = _objects(chat if chat is not None else turns, "messages" if chat is not None else "conversations")
        llava = chat is None and all("from" in one for one in listed)
        read = _llava_message if llava else _chat_message
        messages = tuple(read(i, one, media) for i, one in enumerate(listed))
        media.require_all_used()
    else:
        question, answer, text = (reading.text(row, name) for name in ("question", "answer", "text"))
        if question is None and answer is None and text is not None and not media.names:
            return Document(reading.domain, text, reading.source, question_type=kind, level=level)
        if reading.as_examples and question and answer and not media.names and not row.get("question_evidence"):
            # the most frequent case, kept fast
            return Example(reading.domain, kind, level, question, answer, source=reading.source)
        messages = _one_answer(row, question, answer if answer is not None else text, media, reading)
    conversation = Conversation(reading.domain, messages, reading.source, kind, level)
    return (conversation.as_example() if reading.as_examples else None) or conversation


def _answered(row: Mapping[str, Any], reading: Reading, name: str) -> tuple[Message, ...]:
    """Returns the messages of a preference's prompt and of one of its answers.

    If the first message of an answer is not the assistant's, the answer is the whole conversation with its prompt.
    """
    media, prompt, answer = _Given(row, reading), reading.value(row, "prompt"), reading.value(row, name)
    listed = [{"role": ASSISTANT, "content": answer}] if isinstance(answer, str) else _objects(answer, name)
    if listed and listed[0].get("role") != ASSISTANT:
        whole = tuple(_chat_message(i, one, media) for i, one in enumerate(listed))
        media.require_all_used()
        return whole
    require(prompt is not None, f"no column {reading.columns.prompt!r}: {name} holds an answer without what is asked")
    if isinstance(prompt, str):
        messages: tuple[Message, ...] = (Message("user", (*media.rest(row), Text(prompt))),)
    else:
        messages = tuple(_chat_message(i, one, media) for i, one in enumerate(_objects(prompt, "prompt")))
        media.require_all_used()
    return messages + tuple(_chat_message(len(messages) + i, one, media) for i, one in enumerate(listed))


def _said(message: Message) -> tuple[Any, ...]:
    """Returns what a message says, in a form that can be compared."""
    parts = [part.text if isinstance(part, Text) else (part.kind, part.values.tobytes()) for part in message.parts]
    return message.role, parts, dict(message.more)


def _one_answer(
    row: Mapping[str, Any], question: str | None, answer: str | None, media: "_Given", reading: Reading
) -> tuple[Message, ...]:
    """Reads a question, or a medium that needs none, and its answer."""
    missing = "question" if question is None and not media.names else "answer" if answer is None else None
    if missing is not None:
        has = comma_list(name for name, value in row.items() if value is not None) or "none"
        name = getattr(reading.columns, missing)
        raise UserError(f"no column {name!r}: a row holds {_WANTED}; its columns are {has}; see data.columns")
    parts: list[Part] = list(media.rest(row))
    if question is not None:
        parts.append(Text(question, _spans(row.get("question_evidence"), int)))
    return Message("user", tuple(parts)), Message(ASSISTANT, (Text(str(answer)),))


class _Given:
    """The media of a row outside its messages. Each is used when a message refers to the next one."""

    def __init__(self, row: Mapping[str, Any], reading: Reading) -> None:
        self.reading = reading
        self._left: dict[Kind, list[Any]] = {}
        for kind in () if reading.columns.media_names.isdisjoint(row) else KINDS:
            value = reading.value(row, kind)
            value = row.get(f"{kind}s") if value is None else value
            if value is not None:
                listed = value if isinstance(value, list) and value and not _is_numbers(value) else [value]
                self._left[kind] = list(listed) if value != [] else []
        self.names = [kind for kind, values in self._left.items() if values]
        self._counts = {kind: len(values) for kind, values in self._left.items()}

    def next(self, kind: Kind, evidence: Any = None) -> Medium:
        require(
            bool(self._left.get(kind)),
            f"a message points to another {kind}, but the row holds {self._counts.get(kind, 0)}",
        )
        return read_medium(kind, self._left[kind].pop(0), self.reading, evidence)

    def rest(self, row: Mapping[str, Any]) -> Iterator[Medium]:
        """Yields all unused media, with the row's evidence for them."""
        for kind in self.names:
            for value in self._left[kind]:
                yield read_medium(kind, value, self.reading, row.get(f"{kind}_evidence"))
            self._left[kind] = []

    def require_all_used(self) -> None:
        for kind, values in self._left.items():
            require(
                not values,
                f"the row holds {self._counts[kind]} of {kind}, but its messages point to "
                f"{self._counts[kind] - len(values)}",
            )


def _chat_message(index: int, message: Mapping[str, Any], media: _Given) -> Message:
    """Reads a message in transformers' and OpenAI's form."""
    where = f"message {index}"
    held = {str(key): value for key, value in message.items() if value is not None}
    require("role" in held, f"{where} has no role; valid: {comma_list(ROLES)}")
    require_one_of(f"{where}: role", held["role"], ROLES)
    content = held.get("content", "")
    if isinstance(content, str):
        parts: tuple[Part, ...] = (Text(content, _spans(held.get("evidence"), int)),)
    else:
        listed = _objects(content, f"{where}: content")
        parts = tuple(_chat_part(f"{where}, part {i}", part, media) for i, part in enumerate(listed))
    more = {key: value for key, value in held.items() if key not in ("role", "content", "evidence")}
    return Message(held["role"], joined(parts), more)


def _chat_part(where: str, part: Mapping[str, Any], media: _Given) -> Part:
    held = {str(key): value for key, value in part.items() if value is not None}
    unknown = [key for key in held if key not in _PART_KEYS]
    require(not unknown, f"{where} has unknown keys {comma_list(unknown)}; valid: {comma_list(sorted(_PART_KEYS))}")
    require("type" in held, f"{where} has no type; valid: {comma_list(_PART_TYPES)}")
    require_one_of(f"{where}: type", held["type"], _PART_TYPES)
    if held["type"] == "text":
        text = held.get("text")
        require(isinstance(text, str), f"{where}: text={text!r} must be a string")
        return Text(str(text), _spans(held.get("evidence"), int))
    kind: Kind = {"image_url": "image", "input_audio": "audio"}.get(held["type"], held["type"])  # type: ignore[assignment]
    value = _pointed_to(where, held)
    if value is None:
        return media.next(kind, held.get("evidence"))
    return read_medium(kind, value, media.reading, held.get("evidence"))


def _pointed_to(where: str, part: Mapping[str, Any]) -> Any:
    """Returns the medium that the part holds; None: it refers to the next medium of the row."""
    if part["type"] == "input_audio":
        sound = part.get("input_audio")
        held = isinstance(sound, Mapping) and isinstance(sound.get("data"), str)
        require(held, f"{where}: input_audio must be an object with data in base64")
        return _from_base64(sound["data"], where)  # type: ignore[index]
    if part["type"] == "image_url":
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, Mapping) else address
        require(isinstance(address, str), f"{where}: image_url must be an address, or an object with url")
        return address
    if "base64" in part:
        return _from_base64(part["base64"], where)
    return next((part[key] for key in (part["type"], "path", "url") if key in part), None)


def _llava_message(index: int, message: Mapping[str, Any], media: _Given) -> Message:
    """Reads a message in LLaVA's form, where a marker such as <image> refers to the row's next file."""
    where = f"message {index}"
    require_one_of(f"{where}: from", message["from"], tuple(_LLAVA_ROLES))
    value = message.get("value")
    require(isinstance(value, str), f"{where}: value={value!r} must be a string")
    parts: list[Part] = [Text(str(value))]
    for kind in KINDS:
        marker = f"<{kind}>"
        cut: list[Part] = []
        for part in parts:
            if not isinstance(part, Text):
                cut.append(part)
                continue
            pieces = part.text.split(marker)
            for i, piece in enumerate(pieces):
                cut += [*([media.next(kind)] if i else []), Text(piece)]
        parts = cut
    return Message(_LLAVA_ROLES[message["from"]], joined(tuple(parts)))


def read_medium(kind: Kind, value: Any, reading: Reading, evidence: Any = None) -> Medium:
    """Reads a picture, film or sound from a record's value.

    Raises:
      UserError: if it cannot be read, or the evidence does not fit it.
    """
    name = kind if not isinstance(value, str) or value.startswith("data:") else value
    if isinstance(value, Mapping) and value.get("array") is not None and kind == "audio":
        values = decode_audio(value["array"], name, value.get("sampling_rate"))
    elif kind == "video" and isinstance(value, list) and all(isinstance(one, str | Mapping) for one in value):
        values = decode_video([_content(kind, one, reading) for one in value], name)
    else:
        values = _DECODERS[kind](_content(kind, value, reading), name)
    marks: Any = None
    if evidence is not None and kind == "image":
        marks = pixel_mask((values.shape[0], values.shape[1]), evidence)
    elif evidence is not None and kind == "video":
        marks = np.zeros(values.shape[:3], bool)
        for first, last in _spans(evidence, int):
            require(0 <= first < last <= len(values), f"evidence frames ({first}, {last}) of {len(values)} frames")
            marks[first:last] = True
    elif evidence is not None:
        marks = _spans(evidence, float)
    medium = Medium(kind, values, marks)
    if marks is not None:
        medium.example(reading.domain)  # checks that the evidence is inside
    return medium


def _content(kind: Kind, value: Any, reading: Reading) -> Any:
    """Returns the bytes of the file that a value stands for; other values (numbers, Pillow images) unchanged."""
    if isinstance(value, Mapping):
        known = value.get("bytes") is not None or value.get("path") is not None
        require(known, f"{kind} with fields {comma_list(value)} holds neither bytes nor a path")
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str):
        return value
    if value.startswith("data:"):
        head, comma, data = value.partition(",")
        require(bool(comma) and head.endswith(";base64"), f"{kind}: a data: URL must be in base64")
        return _from_base64(data, kind)
    web = value.startswith(("http://", "https://"))
    require(not web, f"{kind}: {value[:80]} is on the web; download it, and give its path")
    return reading.read(value.removeprefix("file://"))


def _from_base64(data: Any, where: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise UserError(f"{where}: its data is not base64: {error}") from error


def _objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    listed = isinstance(value, list | tuple | np.ndarray) and all(isinstance(one, Mapping) for one in value)
    require(listed, f"{name} must be a list of objects, not {type(value).__name__}")
    return list(value)


def _spans(value: Any, number: type) -> tuple[tuple[Any, Any], ...]:
    """Reads pairs of numbers; () if there is no value."""
    if value is None:
        return ()
    try:
        return tuple((number(start), number(stop)) for start, stop in value)
    except (TypeError, ValueError) as error:
        raise UserError(f"evidence {value!r} must be a list of [start, stop]") from error


def _is_numbers(value: Any) -> bool:
    """Whether nested lists hold numbers, and so are one medium and not a list of media."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float)

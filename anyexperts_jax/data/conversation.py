"""`Conversation`, messages of text, pictures, films and sounds in order, and `Document`, plain text.

`data.records` reads them from files, and `data.turns` encodes them as sequences.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require, require_one_of
from anyexperts_jax.data.example import LEVELS, Example, is_unicode
from anyexperts_jax.tokenizers.chat import ASSISTANT, ROLES

Kind = Literal["image", "audio", "video"]
KINDS: tuple[Kind, ...] = ("image", "audio", "video")


@dataclasses.dataclass(frozen=True)
class Text:
    """Words of a message. `evidence`: half-open spans of its characters that carry the answer.

    Raises:
      UserError: if the text is not valid Unicode, or a span is outside of it.
    """

    text: str
    evidence: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not is_unicode(self.text):
            raise UserError(f"text {self.text!r} is not valid Unicode")
        for start, stop in self.evidence:
            inside = 0 <= start < stop <= len(self.text)
            require(inside, f"evidence span ({start}, {stop}) is outside the text of {len(self.text)} characters")


@dataclasses.dataclass(frozen=True, eq=False)
class Medium:
    """A picture [H, W, 3], a film [F, H, W, 3] or a sound [samples], as fields of `Example` hold them.

    `evidence`, too, is as in `Example`: a mask of pixels, or spans in seconds. `example` checks it.
    """

    kind: Kind
    values: ndarray
    evidence: Bool[ndarray, "..."] | tuple[tuple[float, float], ...] | None = None

    def example(self, domain: str, **texts: Any) -> Example:
        """Returns an example with only this medium.

        Args:
          texts: `question`, `answer`, `question_type` and other fields; missing texts are placeholders.

        Raises:
          UserError: if the evidence does not fit the medium.
        """
        fields: dict[str, Any] = {"question_type": "any", "question": "?", "answer": "?", "source": "", "level": 1}
        fields |= texts
        fields[self.kind] = self.values
        if self.evidence is not None:
            fields[f"{self.kind}_evidence"] = self.evidence
        return Example(domain=domain, **fields)


Part = Text | Medium


@dataclasses.dataclass(frozen=True, eq=False)
class Message:
    """A message of one role, with its parts in order.

    `more`: other keys of the message, such as tool_calls, which a chat template may write.

    Raises:
      UserError: if the role is unknown, or an assistant's message contains more than text.
    """

    role: str
    parts: tuple[Part, ...]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require_one_of("role", self.role, ROLES)
        media = [part.kind for part in self.parts if isinstance(part, Medium)]
        if media and self.role == ASSISTANT:
            raise UserError(f"a message of the {ASSISTANT} holds {', '.join(media)}; only its text can be learned")

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """Messages in order; a model learns those of the assistant.

    A preference is a conversation that ends with the preferred answer and also has a rejected one.

    Raises:
      UserError: if the assistant has no text, the level is unknown, or the rejected answer is the last message itself.
    """

    domain: str
    messages: tuple[Message, ...]
    source: str  # file and row
    question_type: str = "any"
    level: int = 1
    rejected: Message | None = None  # the worse answer, in the place of the last message

    def __post_init__(self) -> None:
        require(self.level in LEVELS, f"level={self.level!r} is unknown; valid: 1, 2, 3")
        roles = [message.role for message in self.messages]
        require(len(roles) > 0, "the conversation is empty; it needs at least one message")
        said = ", ".join(roles[:6]) + (" ..." if len(roles) > 6 else "")
        require(ASSISTANT in roles, f"no turn of the {ASSISTANT}, only {said}: there is nothing to learn in it")
        for number, message in enumerate(self.messages):
            words = message.role != ASSISTANT or bool(message.text) or bool(message.more)
            require(words, f"message {number}: the {ASSISTANT} says nothing")
        if self.rejected is not None:
            pair = (self.messages[-1], self.rejected)
            for name, message in zip(("chosen", "rejected"), pair, strict=True):
                require(message.role == ASSISTANT, f"{name} must end with an answer of the {ASSISTANT}")
                require(bool(message.text or message.more), f"{name}: the {ASSISTANT} says nothing")
            same = pair[0].text == pair[1].text and pair[0].more == pair[1].more
            require(not same, "chosen and rejected are the same answer: nothing is preferred")

    def media(self) -> Iterator[Medium]:
        """Yields all pictures, films and sounds, in order."""
        return (part for message in self.messages for part in message.parts if isinstance(part, Medium))

    def as_example(self) -> Example | None:
        """Returns it as an `Example` if it is one question: at most one medium, then text, then the answer."""
        if self.rejected is not None:
            return None
        if [message.role for message in self.messages] != ["user", ASSISTANT] or any(m.more for m in self.messages):
            return None
        question, answer = self.messages
        texts = [part for part in question.parts if isinstance(part, Text)]
        media = [part for part in question.parts if isinstance(part, Medium)]
        if len(texts) != 1 or not texts[0].text or len(media) > 1 or (media and question.parts[0] is not media[0]):
            return None
        fields: dict[str, Any] = {
            "question_type": self.question_type,
            "question": texts[0].text,
            "answer": answer.text,
            "source": self.source,
        }
        fields |= {"level": self.level, "question_evidence": texts[0].evidence}
        return media[0].example(self.domain, **fields) if media else Example(domain=self.domain, **fields)


@dataclasses.dataclass(frozen=True)
class Document:
    """Text without roles, or a window of it; every token is learned. `ends`: whether the text ends here.

    Raises:
      UserError: if it is empty or not valid Unicode.
    """

    domain: str
    text: str
    source: str
    ends: bool = True
    question_type: str = "any"
    level: int = 1

    def __post_init__(self) -> None:
        require(bool(self.text), "the text is empty")
        require(is_unicode(self.text), f"text {self.text[:40]!r} is not valid Unicode")


Item = Example | Conversation | Document


def question_and_answer(item: Item) -> tuple[str, str]:
    """Returns (text of the last question, last answer); for a document, an empty question and its text."""
    if isinstance(item, Example):
        return item.question, item.answer
    if isinstance(item, Document):
        return "", item.text
    last = max(i for i, message in enumerate(item.messages) if message.role == ASSISTANT)
    asked = [message.text for message in item.messages[:last] if message.role != ASSISTANT]
    return (asked or [""])[-1], item.messages[last].text


def with_answer(item: Item, answer: str) -> Item:
    """Returns the item with another last answer.

    Raises:
      UserError: for a document, which has no answer.
    """
    if isinstance(item, Example):
        return dataclasses.replace(item, answer=answer)
    require(isinstance(item, Conversation), f"{item.source}: a document asks nothing, so there is nothing to choose")
    assert isinstance(item, Conversation)
    last = max(i for i, message in enumerate(item.messages) if message.role == ASSISTANT)
    said = dataclasses.replace(item.messages[last], parts=(Text(answer),))
    return dataclasses.replace(item, messages=(*item.messages[:last], said, *item.messages[last + 1 :]))


def with_rejected(conversation: Conversation) -> Conversation:
    """Returns a preference's conversation with the rejected answer in place of the preferred one.

    Raises:
      UserError: if the conversation is no preference.
    """
    rejected = conversation.rejected
    if rejected is None:
        raise UserError(f"{conversation.source}: the conversation holds no rejected answer")
    return dataclasses.replace(conversation, messages=(*conversation.messages[:-1], rejected), rejected=None)


def joined(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Joins neighbouring texts, since tokens may cross their border, and drops empty ones."""
    found: list[Part] = []
    for part in parts:
        before = found[-1] if found else None
        if isinstance(part, Text) and isinstance(before, Text):
            shift = len(before.text)
            moved = tuple((start + shift, stop + shift) for start, stop in part.evidence)
            found[-1] = Text(before.text + part.text, before.evidence + moved)
        elif not isinstance(part, Text) or part.text:
            found.append(part)
    return tuple(found)


def pixel_mask(shape: tuple[int, int], boxes: Any) -> Bool[ndarray, "H W"]:
    """Marks the pixels inside boxes [left, top, right, bottom]; right and bottom are exclusive.

    Raises:
      UserError: if a box is not inside the picture.
    """
    mask = np.zeros(shape, bool)
    for box in boxes:
        whole = isinstance(box, list | tuple | ndarray) and len(box) == 4 and all(float(edge) >= 0 for edge in box)
        require(whole, f"evidence {box!r} is not a box [left, top, right, bottom] in pixels")
        left, top, right, bottom = (int(edge) for edge in box)
        inside = left < right <= shape[1] and top < bottom <= shape[0]
        require(inside, f"evidence box {list(box)} is outside the picture of {shape[1]} x {shape[0]} pixels")
        mask[top:bottom, left:right] = True
    return mask

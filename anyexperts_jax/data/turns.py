"""Encodes conversations and documents as sequences, and marks the tokens that are learned.

Without a chat template, a conversation is `BOS words SEP answer EOS words SEP answer EOS ...`. The words are those of
all roles but the assistant, in order, with a line break between messages and each medium as a block in its place; the
answer is the assistant's. A question with one medium before it gives the sequence of `data.encode`. With a chat
template, the sequence is the rendered text, with media in their places.

A document is `BOS text EOS`, and all its tokens are learned.
"""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.conversation import Conversation, Document, Item, Medium, Message, Text, with_rejected
from anyexperts_jax.data.encode import encode_example, media_parts
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.sequence import (
    EncodedSequence,
    MediaPart,
    Size,
    TokenPart,
    assemble,
    concatenate,
    last_runs,
)
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.bytes import BYTES
from anyexperts_jax.tokenizers.chat import ASSISTANT, ChatTemplate
from anyexperts_jax.tokenizers.huggingface import DEFAULT_TEMPLATE

_MARK = "\ufdd0"  # stands for a medium in rendered text; Unicode reserves it as a noncharacter
_NOW = datetime.datetime(2026, 1, 1)
Rows = Sequence[TokenPart | MediaPart]


def encode_item(
    item: Item,
    spec: EncodingSpec,
    *,
    tokenizer: Tokenizer = BYTES,
    template: ChatTemplate | None = None,
    **indices: int,
) -> EncodedSequence:
    """Encodes an example, conversation or document as one sequence, without padding.

    Args:
      template: renders conversations; None: they are encoded without a template.
      indices: `domain_index`, `question_index` and `example_index`, which fill domain_B, question_B and example_B.

    Raises:
      UserError: if it does not fit `spec`, or the template refuses it.
    """
    if isinstance(item, Example):
        return encode_example(item, spec, tokenizer=tokenizer, **indices)
    if isinstance(item, Document):
        parts: Rows = document_parts(item, tokenizer)
    elif template is None:
        parts = _plain(item, spec, tokenizer)
    else:
        parts = _by_template(item, spec, tokenizer, template)
    numbers = {name: indices.get(f"{name}_index", 0) for name in ("domain", "question", "example")}
    sequence = assemble(parts, spec, pad=tokenizer.special.pad, level=item.level, **numbers)
    _require_room(item, parts, sequence.size, spec)
    return sequence


def encode_pair(item: Item, spec: EncodingSpec, **how: Any) -> EncodedSequence:
    """Encodes a preference as two segments of one row: the conversation with the preferred answer, then the other.

    Only the last answer of each is in the loss; everything before it is the same in both.

    Args:
      how: arguments of `encode_item`.

    Raises:
      UserError: if the item is no preference, or the two together do not fit `spec`.
    """
    if not isinstance(item, Conversation) or item.rejected is None:
        raise UserError("the row is no preference; train.loss=dpo reads rows with prompt, chosen and rejected")
    both = [encode_item(one, spec, **how) for one in (item, with_rejected(item))]
    size, room = both[0].size + both[1].size, Size.of_row(spec)
    require(
        size.fits(room),
        f"the two conversations of the preference need {size.positions} positions, {size.patches} patches and "
        f"{size.frames} audio frames together, more than encoding.max_length={room.positions}, "
        f"max_patches={room.patches} or max_frames={room.frames}; raise these of data.encoding",
    )
    return concatenate([dataclasses.replace(one, loss_mask_T=last_runs(one.loss_mask_T)) for one in both])


def chat_template(config: DataConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Returns the template that data.chat_template selects; None: conversations are encoded without one.

    Its clock is fixed, so that a run can be reproduced.

    Raises:
      UserError: if the tokenizer has no template of that name, or it does not compile.
    """
    if not uses_template(config, tokenizer):
        return None
    name = DEFAULT_TEMPLATE if config.chat_template == "auto" else config.chat_template
    return ChatTemplate.of(tokenizer, name, now=_NOW)


def uses_template(config: DataConfig, tokenizer: Tokenizer) -> bool:
    """Whether conversations are rendered with a chat template."""
    if config.chat_template == "auto":
        return bool(getattr(tokenizer, "chat_templates", None))
    return config.chat_template != "none"


def document_parts(document: Document, tokenizer: Tokenizer) -> list[TokenPart]:
    """Returns the begin token, and the text's tokens with the end token, which are learned."""
    ends = [tokenizer.special.eos[0]] if document.ends else []
    ids = [*tokenizer.encode(document.text).ids_T.tolist(), *ends]
    require(len(ids) > 0, f"tokenizer {tokenizer.name!r} has no token for the text")
    return [TokenPart([tokenizer.special.begin]), TokenPart(ids, in_loss=True)]


def _plain(conversation: Conversation, spec: EncodingSpec, tokenizer: Tokenizer) -> Rows:
    special = tokenizer.special
    media = iter(_encoded_media(conversation, spec))
    parts: list[TokenPart | MediaPart] = [TokenPart([special.begin])]
    before = None
    for number, message in enumerate(conversation.messages):
        require(
            not message.more,
            f"message {number} holds {comma_list(message.more)}, which only a chat template can write "
            "(data.chat_template)",
        )
        if message.role == ASSISTANT:
            answer = tokenizer.encode(message.text).ids_T.tolist()
            parts += [TokenPart([special.separator]), TokenPart([*answer, special.eos[0]], in_loss=True)]
        else:
            if before not in (None, ASSISTANT):
                parts.append(TokenPart(tokenizer.encode("\n").ids_T))
            parts += [_tokens(part, tokenizer) if isinstance(part, Text) else next(media) for part in message.parts]
        before = message.role
    return parts


def _tokens(part: Text, tokenizer: Tokenizer) -> TokenPart:
    tokens = tokenizer.encode(part.text)
    return TokenPart(tokens.ids_T, evidence=tokens.overlapping(part.evidence) if part.evidence else None)


def _by_template(
    conversation: Conversation, spec: EncodingSpec, tokenizer: Tokenizer, template: ChatTemplate
) -> list[TokenPart | MediaPart]:
    """Renders a conversation with the template and cuts the text at its media."""
    media = _encoded_media(conversation, spec)
    rendered = template.render([_for_template(message) for message in conversation.messages])
    text = rendered.text
    pieces = text.split(_MARK)
    require(
        len(pieces) == len(media) + 1,
        f"the chat template writes {len(pieces) - 1} of the conversation's {len(media)} media; "
        "set data.chat_template=none",
    )
    evidence = _evidence_in(text, conversation.messages)
    parts: list[TokenPart | MediaPart] = []
    begin = 0
    for number, piece in enumerate(pieces):
        tokens = tokenizer.encode_rendered(piece) if piece else tokenizer.encode("")
        said_T, marked_T = (
            tokens.overlapping(_within(spans, begin, piece)) for spans in (rendered.assistant, evidence)
        )
        runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(said_T.astype(int))) + 1)
        parts += [
            TokenPart(tokens.ids_T[run], in_loss=bool(said_T[run[0]]), evidence=marked_T[run])
            for run in runs
            if len(run)
        ]
        if number < len(media):
            parts.append(media[number])
        begin += len(piece) + len(_MARK)
    first = parts[0]
    if isinstance(first, MediaPart) or first.in_loss:  # no position before it could predict it
        parts.insert(0, TokenPart([tokenizer.special.begin]))
    return parts


def _within(spans: Sequence[tuple[int, int]], begin: int, piece: str) -> list[tuple[int, int]]:
    """Converts spans of the whole text to spans of the piece that begins at `begin`."""
    moved = [(max(start - begin, 0), min(stop - begin, len(piece))) for start, stop in spans]
    return [(start, stop) for start, stop in moved if start < stop]


def _for_template(message: Message) -> dict[str, Any]:
    """Returns the message as templates read it, with a mark for each medium."""
    content = "".join(part.text if isinstance(part, Text) else _MARK for part in message.parts)
    require(
        content.count(_MARK) == sum(isinstance(part, Medium) for part in message.parts),
        "the text holds U+FDD0, which is no character",
    )
    return {"role": message.role, "content": content, **message.more}


def _evidence_in(text: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Returns the messages' evidence as spans of the rendered text."""
    found, reached = [], 0
    for message in messages:
        for part in message.parts:
            if not isinstance(part, Text) or not part.evidence:
                continue
            words = part.text.strip()
            at = text.find(words, reached)
            if at < 0:
                raise UserError("the chat template changes a text with evidence, so its place is not known")
            lead = len(part.text) - len(part.text.lstrip())
            found += [(at + start - lead, at + stop - lead) for start, stop in part.evidence]
            reached = at + len(words)
    return found


def _encoded_media(conversation: Conversation, spec: EncodingSpec) -> list[MediaPart]:
    """Encodes each medium. Pictures and films share the patches of a sequence."""
    media = list(conversation.media())
    visual = sum(medium.kind != "audio" for medium in media)
    share = spec if visual < 2 else dataclasses.replace(spec, max_patches=spec.max_patches // visual)
    if visual and share.max_patches < 1 <= spec.max_patches:
        raise UserError(f"{visual} pictures and films, more than encoding.max_patches={spec.max_patches}")
    return [part for medium in media for part in media_parts(medium.example(conversation.domain), share)]


def _require_room(item: Item, parts: Rows, size: Size, spec: EncodingSpec) -> None:
    """Checks that a sequence fits in a row; the error lists its parts."""
    room = Size.of_row(spec)
    if size.fits(room):
        return
    sizes: dict[str, int] = {}
    for part in parts:
        name = "media" if isinstance(part, MediaPart) else "learned" if part.in_loss else "other text"
        sizes[name] = sizes.get(name, 0) + len(part.features if isinstance(part, MediaPart) else part.ids)
    made_of = comma_list(f"{name} {count}" for name, count in sizes.items())
    over = {
        f"data.encoding.{key}": f"{needed} {name}, more than encoding.{key}={there}"
        for name, key, needed, there in (
            ("positions", "max_length", size.positions, room.positions),
            ("patches", "max_patches", size.patches, room.patches),
            ("audio frames", "max_frames", size.frames, room.frames),
        )
        if needed > there
    }
    what = "document" if isinstance(item, Document) else "conversation"
    raise UserError(f"the {what} needs {' and '.join(over.values())} ({made_of}); raise {comma_list(over)}")

"""Records with pictures, sounds and videos as a published model reads them: prompts, and the answers to predict."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.rounding import round_up
from anyexperts_jax.data.conversation import KINDS, Conversation, Medium, Message, Text
from anyexperts_jax.data.records import Reading, read_record
from anyexperts_jax.data.sources.find import find_rows
from anyexperts_jax.data.sources.places import StoreError
from anyexperts_jax.data.sources.rows import RowError, Rows
from anyexperts_jax.evaluate.dials import Inputs
from anyexperts_jax.pretrained.media import Shown
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.pictures import Video
from anyexperts_jax.pretrained.placing import place
from anyexperts_jax.tokenizers.chat import ASSISTANT

_LENGTH_STEP = 64  # rows are padded to a multiple, so that few programs are compiled
_FPS = 2.0  # of a video in a record, which does not say when its frames are shown


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """A batch of records."""

    inputs: Inputs
    answer_BT: Bool[ndarray, "B T"]  # tokens of the answers, which are predicted
    contexts: tuple[str, ...]  # of each row what its prompt holds beside text, as "image+audio"; "text" for nothing


@dataclasses.dataclass(frozen=True, eq=False)
class _Record:
    ids: list[int]
    answer: int  # tokens of the answer, at the end
    shown: Shown | None
    context: str


def read_records(m: Pretrained, data: str, most: int, batch_rows: int) -> list[Scored]:
    """The first records at a place, in batches.

    A record is what `data.records.read_record` reads: a question with media, or a conversation, of which the
    assistant's last turn is the answer. An answer's tokens are those of its text and the one that ends it.

    Args:
      data: a file, pattern, folder or address, as `--data` takes it.
      most: records.
      batch_rows: records of a batch.

    Raises:
      UserError: when there are none; RowError, with file and row, for one that the model cannot read.
    """
    _, rows = find_rows(data)
    require(len(rows) > 0, f"{data}: there are no rows in the data")
    records = [_read(m, data, rows, index) for index in range(min(most, len(rows)))]
    return [_batch(m, records[first : first + batch_rows]) for first in range(0, len(records), batch_rows)]


def _read(m: Pretrained, data: str, rows: Rows, index: int) -> _Record:
    file, row = rows.where(index)

    def read(path: str) -> bytes:
        return rows.read(index, path)

    try:
        item = read_record(rows[index], Reading(data, f"{file} {row}".strip(), read, labels=rows.labels))
        require(isinstance(item, Conversation), "the row is a text without a question; measure it with --text")
        assert isinstance(item, Conversation)
        return _record(m, item)
    except StoreError as error:
        raise StoreError(f"{file} {row}: {error}") from error
    except UserError as error:
        raise error if isinstance(error, RowError) else RowError(file, row, str(error)) from error


def _record(m: Pretrained, item: Conversation) -> _Record:
    last = max(number for number, message in enumerate(item.messages) if message.role == ASSISTANT)
    require(last > 0, "the conversation begins with its answer; nothing asks for it")
    asked = item.messages[:last]
    ids, shown = m.prepared([_as_prompt(message) for message in asked])
    answer = [*m.tokenizer.encode(item.messages[last].text).ids_T.tolist(), m.tokenizer.special.eos[0]]
    length, room = len(ids) + len(answer), m.config.max_length
    require(length <= room, f"the record has {length} tokens with its media, the model {room} positions")
    held = {part.kind for message in asked for part in message.parts if isinstance(part, Medium)}
    return _Record([*ids, *answer], len(answer), shown, "+".join(kind for kind in KINDS if kind in held) or "text")


def _as_prompt(message: Message) -> dict[str, Any]:
    """The message as `Pretrained` reads conversations. Text alone stays a text: some templates know nothing else."""
    if not any(isinstance(part, Medium) for part in message.parts):
        return {"role": message.role, "content": message.text, **message.more}
    return {"role": message.role, "content": [_as_part(part) for part in message.parts], **message.more}


def _as_part(part: Text | Medium) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": part.kind, part.kind: Video(part.values, _FPS) if part.kind == "video" else part.values}


def _batch(m: Pretrained, records: Sequence[_Record]) -> Scored:
    longest = max(len(one.ids) for one in records)
    width = min(round_up(longest, _LENGTH_STEP), m.config.max_length)
    tokens_BT = np.zeros((len(records), width), np.int32)
    valid_BT, answer_BT = np.zeros(tokens_BT.shape, bool), np.zeros(tokens_BT.shape, bool)
    for row, one in enumerate(records):
        tokens_BT[row, : len(one.ids)] = one.ids
        valid_BT[row, : len(one.ids)] = True
        answer_BT[row, len(one.ids) - one.answer : len(one.ids)] = True
    shown = Shown.joined([one.shown for one in records])
    placed = None if shown is None else place(shown, tokens_BT, valid_BT).media
    inputs = Inputs(jnp.asarray(tokens_BT), placed, jnp.asarray(valid_BT))
    return Scored(inputs, answer_BT, tuple(one.context for one in records))

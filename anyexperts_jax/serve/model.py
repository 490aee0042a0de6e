"""Loads the model to serve, a published checkpoint or a trained run, with a reader of its prompts."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from anyexperts_jax.core.errors import require, shown
from anyexperts_jax.core.rounding import round_up
from anyexperts_jax.data.batches import prompts, stack
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.conversation import Conversation, Document, Medium, Message, Part, Text, joined
from anyexperts_jax.data.decode import decode_audio, decode_picture, decode_video
from anyexperts_jax.data.sequence import padded
from anyexperts_jax.data.turns import chat_template, encode_item, uses_template
from anyexperts_jax.data.video_file import MAX_FRAMES
from anyexperts_jax.evaluate.trained import Trained, load_trained
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.budget import with_budget
from anyexperts_jax.pretrained.decode import Weights
from anyexperts_jax.pretrained.load import is_checkpoint
from anyexperts_jax.pretrained.lora import Adapter, read_adapter, with_adapters
from anyexperts_jax.pretrained.media import readable_kinds
from anyexperts_jax.pretrained.model import Pretrained
from anyexperts_jax.pretrained.pictures import Video
from anyexperts_jax.pretrained.placing import place
from anyexperts_jax.pretrained.prompts import leading_ids, prompt_tokens
from anyexperts_jax.serve.engine import Prompt
from anyexperts_jax.serve.media import part_of
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.chat import ASSISTANT
from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.published import is_tuned, load_published

_LENGTH_STEP = 64  # prompts with media are padded to a multiple, so that few programs are compiled


@runtime_checkable
class Reader(Protocol):
    """Turns the contents of a request into a prompt. Each method raises UserError for what the model cannot read."""

    media: tuple[str, ...]  # what it reads beside text: "image", "video", "audio"

    def text(self, text: str) -> Prompt: ...

    def ids(self, ids: Sequence[int]) -> Prompt: ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Prompt: ...

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """Like `chat`, but a part holds its medium itself: {"type": "image", "image": picture}."""
        ...

    def typical(self) -> Prompt | None:
        """A prompt with room for media, whose program all such prompts share; None: there is none."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ServedModel:
    """A model whose window has room for the largest budget, with its tokenizer and the reader of its prompts."""

    name: str
    weights: Weights
    base: ModelConfig  # as trained or published
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    reader: Reader
    longest: int  # maximal number of positions of prompt and answer
    leading_ids: tuple[int, ...] = ()  # put before every text
    path: pathlib.Path | None = None  # of a published checkpoint
    adapters: Mapping[str, Weights] = dataclasses.field(default_factory=dict)  # the same with an adapter each, by name

    def with_adapter(self, name: str) -> "ServedModel":
        """The model with one of its adapters, and no other."""
        return dataclasses.replace(self, weights=self.adapters[name], adapters={})


def load_served(
    path: pathlib.Path,
    checkpoint: str = "best",
    max_budget: float | None = None,
    name: str | None = None,
    *,
    adapters: Mapping[str, pathlib.Path] | None = None,
) -> ServedModel:
    """Loads the model in a folder, a run or a published checkpoint.

    Args:
      checkpoint: which checkpoint of a run, "best" or "last".
      max_budget: largest budget, in real experts per token, that a request may ask for; None: what the model's own
        window has room for.
      name: the name that clients use; None: the folder's name.
      adapters: folders of low-rank adapters, by the name that clients use for the model with each.

    Raises:
      UserError: if there is no model, it has no tokenizer, it cannot reach the budget, or an adapter was trained on
        another base.
    """
    name, folders = name or path.resolve().name, adapters or {}
    require(name not in folders, f"--adapter: {name} is the name of the model itself; choose another one")
    tuned = is_tuned(path)
    if not (tuned or is_checkpoint(path)):
        require(not folders, f"--adapter: {path} did not start from a published checkpoint; adapters fit those alone")
        return serve_trained(load_trained(path, checkpoint), name, max_budget)
    beside = {own: read_adapter(folder) for own, folder in folders.items()}  # before gigabytes are read
    model = load_published(path, checkpoint)
    served = serve_pretrained(model, name, max_budget, beside)
    return dataclasses.replace(served, reader=_reader_of_run(path, model, served.reader)) if tuned else served


def _reader_of_run(path: pathlib.Path, model: Pretrained, reader: Reader) -> Reader:
    """Returns a reader that writes conversations as the run's examples were, if the tokenizer's template did not."""
    data = load_config(path).data
    if data.chat_template == "auto" and uses_template(data, model.tokenizer):
        return reader
    return TunedReader(data, model)


def serve_pretrained(
    model: Pretrained, name: str, max_budget: float | None = None, adapters: Mapping[str, Adapter] | None = None
) -> ServedModel:
    """Prepares a published model to be served under a name.

    Args:
      adapters: by the name that clients use for the model with each.

    Raises:
      UserError: if it has no tokenizer, it cannot reach the budget, or an adapter was trained on another base.
    """
    tokenizer = model.tokenizer
    beside = with_adapters(model, adapters) if adapters else {}
    return ServedModel(
        name,
        _weights_with_room(model, max_budget),
        model.config,
        tokenizer,
        stop_ids=tuple(dict.fromkeys([*model.stop_ids, *tokenizer.special.eos])),
        reader=CheckpointReader(model),
        longest=model.config.max_length,
        leading_ids=tuple(leading_ids(tokenizer)),
        path=model.path,
        adapters={own: _weights_with_room(adapted, max_budget) for own, adapted in beside.items()},
    )


def serve_trained(trained: Trained, name: str, max_budget: float | None = None) -> ServedModel:
    """Prepares a run's checkpoint to be served under a name.

    Raises:
      UserError: if the model cannot reach the budget.
    """
    base, tokenizer = trained.config.model, trained.tokenizer
    bias_LC = trained.router_bias_LC if base.moe.expert_bias else None
    return ServedModel(
        name,
        Weights(_with_room(base, max_budget), trained.placement, trained.params, bias_LC),
        base,
        tokenizer,
        stop_ids=tuple(dict.fromkeys([base.eos_id, *tokenizer.special.eos])),
        reader=RunReader(trained.config.data, tokenizer),
        longest=base.max_length,
        leading_ids=(tokenizer.special.begin,),
    )


def _weights_with_room(model: Pretrained, max_budget: float | None) -> Weights:
    return dataclasses.replace(model.weights, config=_with_room(model.config, max_budget))


def _with_room(base: ModelConfig, max_budget: float | None) -> ModelConfig:
    return base if max_budget is None else with_budget(base, max_budget)[0]


class CheckpointReader:
    """Reads texts and conversations for a published model, with pictures and sounds if it has towers for them."""

    def __init__(self, model: Pretrained) -> None:
        self._model, self._tokenizer = model, model.tokenizer
        self.media = readable_kinds(model.config)

    def typical(self) -> Prompt | None:
        return None

    def text(self, text: str) -> Prompt:
        return Prompt(tuple(prompt_tokens(self._tokenizer, text)))

    def ids(self, ids: Sequence[int]) -> Prompt:
        return Prompt(tuple(ids))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        read = [_with_decoded(f"messages[{i}]", message, self.media) for i, message in enumerate(messages)]
        return self.conversation(read)

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        ids, shown = self._model.prepared(messages)
        if shown is None:
            return Prompt(tuple(ids))
        room = self._model.config.max_length
        require(len(ids) <= room, f"the prompt has {len(ids)} tokens with its media, the model {room} positions")
        tokens_1T = np.zeros((1, min(round_up(len(ids), _LENGTH_STEP), room)), np.int32)
        tokens_1T[0, : len(ids)] = ids
        return Prompt(tuple(ids), placed=place(shown, tokens_1T, np.arange(tokens_1T.shape[1])[None] < len(ids)))


class RunReader:
    """Reads text, pictures and sounds for a run, encoded as its training examples are."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        self._spec, self._tokenizer = data.encoding, tokenizer
        self._template = chat_template(data, tokenizer)
        patches = data.encoding.max_patches
        rooms = (("image", patches), ("video", patches), ("audio", data.encoding.max_frames))
        self.media = tuple(kind for kind, room in rooms if room > 0)

    def typical(self) -> Prompt | None:
        return self.chat([{"role": "user", "content": "?"}]) if self.media else None

    def text(self, text: str) -> Prompt:
        """Encodes a text as the beginning of a document."""
        return self._prompt(Document("served", text, "request", ends=False), whole=True)

    def ids(self, ids: Sequence[int]) -> Prompt:
        return Prompt(tuple(ids))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        return self._asked([self._message(i, message, self._part) for i, message in enumerate(messages)])

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        return self._asked([self._message(i, message, _held) for i, message in enumerate(messages)])

    def _asked(self, read: Sequence[Message]) -> Prompt:
        require(bool(read), "messages is empty; it needs at least one message")
        answer = Message(ASSISTANT, (Text("?"),))  # a placeholder for the model's answer; `prompts` cuts it off
        return self._prompt(Conversation("served", (*read, answer), "request"), whole=False)

    def _prompt(self, item: Conversation | Document, whole: bool) -> Prompt:
        sequence = encode_item(item, self._spec, tokenizer=self._tokenizer, template=self._template)
        batch = stack([padded(sequence, self._spec)])
        batch = batch if whole else prompts(batch, self._tokenizer)
        valid_T = np.asarray(batch.valid_BT)[0]
        return Prompt(tuple(np.asarray(batch.tokens_BT)[0][valid_T].tolist()), batch)

    def _message(self, number: int, message: Mapping[str, Any], read: Callable[[str, Any], Part]) -> Message:
        where = f"messages[{number}]"
        unknown = sorted(set(message) - {"role", "content"})
        require(not unknown, f"{where} holds {', '.join(unknown)}; the run reads role and content")
        role, content = message.get("role", ""), message.get("content")
        require(isinstance(role, str), f"{where}: role={shown(role)} must be a text")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        require(isinstance(parts, list) and len(parts) > 0, f"{where}: content must be a text or a list of parts")
        assert isinstance(parts, list)
        found = [read(f"{where}.content[{i}]", part) for i, part in enumerate(parts)]
        return Message(role, joined(tuple(found)))

    def _part(self, where: str, part: Any) -> Part:
        if _is_text(part):
            return Text(part["text"])
        return _held(where, part_of(part, where, self.media))


class TunedReader(CheckpointReader):
    """Text as for the checkpoint that a run started from; conversations as the run's examples were written."""

    def __init__(self, data: DataConfig, model: Pretrained) -> None:
        super().__init__(model)
        self._learned = RunReader(data, model.tokenizer)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        return self._learned.chat(messages)._replace(batch=None)  # no media, so it is read piece by piece

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        return self._learned.conversation(messages)._replace(batch=None)


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _with_decoded(where: str, message: Mapping[str, Any], kinds: Sequence[str]) -> Mapping[str, Any]:
    """Decodes a message's media. Without any, joins its text parts, since many chat templates read nothing else.

    Args:
      kinds: of media that the model reads.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [
        part if _is_text(part) else part_of(part, f"{where}.content[{i}]", kinds) for i, part in enumerate(content)
    ]
    if all(map(_is_text, parts)):
        return {**message, "content": "".join(part["text"] for part in parts)}
    return {**message, "content": parts}


def _held(where: str, part: Any) -> Part:
    """Decodes a part that holds its medium itself."""
    if _is_text(part):
        return Text(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else None
    value = part.get(kind) if isinstance(part, Mapping) else None
    value = pathlib.Path(value) if isinstance(value, str) else value
    if kind == "image":
        return Medium("image", decode_picture(value, where))
    if kind == "audio":
        return Medium("audio", decode_audio(value, where))
    require(kind == "video", f"{where}: type={shown(kind)}; a part is of type text, image, audio or video")
    frames = value.decoded(where, MAX_FRAMES)[0] if isinstance(value, Video) else decode_video(value, where)
    return Medium("video", frames)

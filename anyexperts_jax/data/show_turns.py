"""Prints conversations and documents with the learned parts marked, and writes their media to files."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.names import file_name
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.conversation import Conversation, Document, Item, Medium
from anyexperts_jax.data.example import SAMPLE_RATE
from anyexperts_jax.data.turns import chat_template, encode_item
from anyexperts_jax.data.wav_file import write_wav
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.chat import ASSISTANT, ChatTemplate
from anyexperts_jax.tokenizers.store import open_tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Numbered = Sequence[tuple[int, Item | UserError]]


def show_items(
    items: Numbered, config: DataConfig, name: str, out_dir: pathlib.Path, console: "Console"
) -> list[pathlib.Path]:
    """Prints conversations and documents with the learned parts underlined, and writes their media; returns the files.

    Raises:
      UserError: if `out_dir` cannot be written, or the tokenizer cannot be read.
    """
    from rich.text import Text

    tokenizer = open_tokenizer(config.tokenizer)
    template = chat_template(config, tokenizer)
    written: list[pathlib.Path] = []
    for number, item in items:
        if isinstance(item, UserError):
            console.print(Text(f"#{number}  cannot be used: {item}", style="red"), soft_wrap=True)
            continue
        made_of = _made_of(item, config, tokenizer, template)
        console.print(Text(f"#{number}  {item.source}  {made_of}", style="bold"), soft_wrap=True)
        if isinstance(item, Document):
            console.print(_learned(item.text), soft_wrap=True)
        elif isinstance(item, Conversation):
            written += _show_conversation(item, out_dir / f"{file_name(name)}_{number}", console)
    if written:
        console.print(f"wrote {len(written)} pictures and sounds to {out_dir}", highlight=False, markup=False)
    return written


def _show_conversation(conversation: Conversation, stem: pathlib.Path, console: "Console") -> list[pathlib.Path]:
    from rich.text import Text

    written: list[pathlib.Path] = []
    for message in conversation.messages:
        line = Text(f"  {message.role:<10}")
        for part in message.parts:
            if isinstance(part, Medium):
                path = _write_medium(part, stem.with_name(f"{stem.name}_{len(written)}"))
                written.append(path)
                line.append(f"[{_size(part)}: {path.name}]", style="cyan")
                continue
            start = len(line)
            line.append_text(_learned(part.text) if message.role == ASSISTANT else Text(part.text))
            for begin, end in part.evidence:
                line.stylize("reverse", start + begin, start + end)
        for key, value in message.more.items():
            line.append(f" {key}={value}", style="dim")
        console.print(line, soft_wrap=True)
    if conversation.rejected is not None:
        console.print(Text(f"  {'rejected':<10}{conversation.rejected.text}", style="red"), soft_wrap=True)
    return written


def _learned(text: str) -> "Text":
    from rich.text import Text

    return Text(text, style="underline green")


def _made_of(item: Item, config: DataConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> str:
    """Describes the length of an item's sequence and how much of it is learned, or why it cannot be encoded."""
    try:
        sequence = encode_item(item, config.encoding, tokenizer=tokenizer, template=template)
    except UserError as error:
        return f"cannot be used: {error}"
    return f"{sequence.size.positions} positions, {int(sequence.loss_mask_T.sum())} learned"


def _size(medium: Medium) -> str:
    shape = medium.values.shape
    if medium.kind == "audio":
        return f"audio {shape[0] / SAMPLE_RATE:.2f} s"
    frames = f" of {shape[0]} frames" if medium.kind == "video" else ""
    return f"{medium.kind} {shape[-2]} x {shape[-3]}{frames}"


def _write_medium(medium: Medium, stem: pathlib.Path) -> pathlib.Path:
    """Writes a medium to a file; a film's frames are put side by side."""
    from PIL import Image

    path = stem.with_name(stem.name + (".wav" if medium.kind == "audio" else ".png"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if medium.kind == "audio":
            write_wav(path, medium.values)
        else:
            pixels = np.concatenate(list(medium.values), axis=1) if medium.kind == "video" else medium.values
            Image.fromarray(pixels).save(path)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}") from error
    return path

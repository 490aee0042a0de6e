"""The byte tokenizer: UTF-8 bytes and four special tokens."""

from collections.abc import Iterable
from typing import SupportsInt

from anyexperts_jax.core.errors import require

PAD = 256  # padding, and the place of a media token
BOS = 257
SEP = 258  # ends the question
EOS = 259  # ends the answer
VOCAB_SIZE = 260


def require_special_ids(pad_id: int, eos_id: int) -> None:
    """Checks the ids by which a model pads and stops: with others it would never stop, since no training teaches them.

    Raises:
      UserError: naming the one that is not the tokenizer's, and what to set.
    """
    for name, value, owned in (("pad_id", pad_id, PAD), ("eos_id", eos_id, EOS)):
        require(value == owned, f"model.{name}={value} is not the tokenizer's; set model.{name}={owned}")


def encode(text: str) -> list[int]:
    """The UTF-8 bytes of `text`, each a token id in [0, 256)."""
    return list(text.encode("utf-8"))


def decode(ids: Iterable[SupportsInt]) -> str:
    """The text of the byte tokens in `ids`; special tokens are left out, broken UTF-8 reads as U+FFFD."""
    return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")


def byte_spans(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans of characters `text[start:end]` as spans of bytes, which is to say of tokens."""
    return [(len(encode(text[:start])), len(encode(text[:end]))) for start, end in spans]

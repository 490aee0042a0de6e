"""The byte tokenizer: UTF-8 bytes and four special tokens. It needs no file."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterable
from typing import SupportsInt

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from anyexperts_jax.tokenizers.base import SpecialIds, TokenSpans, require_unicode

PAD = 256  # padding, and the placeholder of media
BOS = 257
SEP = 258  # ends the question
EOS = 259  # ends the answer
VOCAB_SIZE = 260
NAME = "bytes"

_SPECIAL_NAMES = {PAD: "<pad>", BOS: "<bos>", SEP: "<sep>", EOS: "<eos>"}


def _offsets(ids_T: Int32[ndarray, " T"]) -> Int32[ndarray, "T 2"]:
    begins_T = (ids_T & 0xC0) != 0x80  # bytes of the form 10xxxxxx continue a character
    starts_T = begins_T.cumsum(dtype=np.int32) - np.int32(1)
    return np.stack([starts_T, starts_T + np.int32(1)], axis=1)


@dataclasses.dataclass(frozen=True)
class BytesTokenizer:
    """Makes one token of each byte. Its special ids have no spelling, so no text can contain them."""

    @classmethod
    def reads(cls, path: pathlib.Path) -> bool:
        """Returns False: no file identifies a byte tokenizer; only the record of a run does."""
        return False

    @classmethod
    def load(cls, path: pathlib.Path, name: str | None = None) -> "BytesTokenizer":
        return cls()

    @property
    def kind(self) -> str:
        return NAME

    @property
    def name(self) -> str:
        return NAME

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def special(self) -> SpecialIds:
        return SpecialIds(pad=PAD, eos=(EOS,), bos=BOS, sep=SEP)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"bytes {self.special.framing}".encode()).hexdigest()

    def encode(self, text: str) -> TokenSpans:
        """The UTF-8 bytes of `text`, each a token id in [0, 256)."""
        require_unicode(text)
        ids_T = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        return TokenSpans(ids_T, functools.partial(_offsets, ids_T))

    def encode_rendered(self, text: str) -> TokenSpans:
        return self.encode(text)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Decodes the byte tokens in `ids`; special tokens are left out, and invalid UTF-8 becomes U+FFFD."""
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")

    def pieces(self, ids: Iterable[SupportsInt]) -> list[str]:
        """Returns ASCII characters unchanged, and other bytes in hexadecimal."""
        return [_SPECIAL_NAMES.get(i, chr(i) if i < 128 else f"<{i:02X}>") for i in map(int, ids)]

    def save(self, folder: pathlib.Path) -> None:
        """Writes nothing, since the record is sufficient."""


BYTES = BytesTokenizer()

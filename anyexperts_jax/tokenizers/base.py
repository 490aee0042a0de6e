"""The protocol `Tokenizer`: encodes text to ids with character offsets, and decodes ids to text."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Protocol, SupportsInt, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require

_SHOWN = 12  # characters of a fingerprint in error messages


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids that frame a sequence.

    Raises:
      UserError: if no id ends an answer.
    """

    pad: int  # fills sequences, and is the placeholder of patches and audio frames
    eos: tuple[int, ...]  # end an answer: training writes the first one, generation stops at any
    bos: int | None = None
    sep: int | None = None

    def __post_init__(self) -> None:
        require(len(self.eos) > 0, "a tokenizer needs at least one id that ends an answer (eos)")

    @property
    def begin(self) -> int:
        """The id that begins a sequence: bos, or eos in a vocabulary without bos, as between two documents."""
        return self.eos[0] if self.bos is None else self.bos

    @property
    def separator(self) -> int:
        """The id between question and answer: sep, or eos in a vocabulary without sep."""
        return self.eos[0] if self.sep is None else self.sep

    @property
    def framing(self) -> dict[str, int | None]:
        """Returns the ids that training writes into sequences. Further eos ids only stop generation."""
        return {"pad": self.pad, "bos": self.bos, "sep": self.sep, "eos": self.eos[0]}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSpans:
    """The token ids of a text, and for each the half-open span of characters `text[start:stop]` that it covers.

    Spans are sorted by start. All tokens of one character, such as the bytes of an emoji, have its span. A token that
    covers no character, such as a space put before the text, has an empty span. Characters that the tokenizer drops,
    such as spaces at the ends, are in no span.
    """

    ids_T: Int32[ndarray, " T"]
    find_offsets: Callable[
        [], Int32[ndarray, "T 2"]
    ]  # computes `offsets_T2` when needed, since most callers need only ids

    @functools.cached_property
    def offsets_T2(self) -> Int32[ndarray, "T 2"]:
        """The spans, one row per token."""
        return self.find_offsets()

    def __len__(self) -> int:
        return len(self.ids_T)

    def overlapping(self, spans: Iterable[tuple[int, int]]) -> Bool[ndarray, " T"]:
        """Marks the tokens that cover a character of any of these spans."""
        marked_T = np.zeros(len(self), bool)
        spans = list(spans)
        if not spans:  # computing offsets would take as long as the rest of an example
            return marked_T
        starts_T, stops_T = self.offsets_T2.T
        for start, stop in spans:
            marked_T |= (starts_T < stop) & (stops_T > start) & (starts_T < stops_T)
        return marked_T

    def dropped(self, text: str) -> str:
        """Returns the characters of `text`, without spaces, that no token covers."""
        kept = np.zeros(len(text) + 1, np.int64)
        np.add.at(kept, self.offsets_T2[:, 0], 1)
        np.add.at(kept, self.offsets_T2[:, 1], -1)
        return "".join(c for c, depth in zip(text, kept.cumsum()[:-1], strict=True) if depth == 0 and not c.isspace())


@runtime_checkable
class Tokenizer(Protocol):
    """Encodes text to ids and decodes them. Immutable, picklable and thread-safe.

    Tokenizers with equal fingerprints give the same ids for every text and frame sequences in the same way.
    """

    @property
    def kind(self) -> str:
        """Its key in `core.registries.TOKENIZERS`."""
        ...

    @property
    def name(self) -> str:
        """Its name in messages and tables."""
        ...

    @property
    def vocab_size(self) -> int:
        """The largest id + 1, which is the number of embeddings that it needs."""
        ...

    @property
    def special(self) -> SpecialIds: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> TokenSpans:
        """Encodes a text written by a user: what looks like a special token is treated as text.

        Raises:
          UserError: if the text is not valid Unicode (it has a lone surrogate).
        """
        ...

    def encode_rendered(self, text: str) -> TokenSpans:
        """Encodes a text rendered by a chat template: spellings of special tokens become these tokens.

        Raises:
          UserError: if the text is not valid Unicode (it has a lone surrogate).
        """
        ...

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Decodes `ids`; special ids, and ids at or past `vocab_size`, are left out."""
        ...

    def pieces(self, ids: Iterable[SupportsInt]) -> list[str]:
        """Returns a readable form of each id, special ones by name, for tables and pictures."""
        ...

    def save(self, folder: pathlib.Path) -> None:
        """Writes a copy into an existing folder, from which its kind's `load` makes an equal tokenizer."""
        ...


class TokenizerKind(Protocol):
    """Loads tokenizers of one kind; an entry of `core.registries.TOKENIZERS`."""

    def reads(self, path: pathlib.Path) -> bool:
        """Whether the existing `path` looks like a tokenizer of this kind."""
        ...

    def load(self, path: pathlib.Path, name: str | None = None) -> Tokenizer:
        """Loads the tokenizer at `path`; None as `name` takes it from the path.

        Raises:
          UserError: if it cannot be read.
        """
        ...


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """The record of a tokenizer that a run keeps beside the copy."""

    kind: str
    name: str
    vocab_size: int
    fingerprint: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenizerRecord":
        return cls(tokenizer.kind, tokenizer.name, tokenizer.vocab_size, tokenizer.fingerprint)

    def describe(self) -> str:
        return f"{self.name!r} ({self.kind}, {self.vocab_size} ids, fingerprint {self.fingerprint[:_SHOWN]})"


def require_same_tokenizer(recorded: TokenizerRecord, given: Tokenizer) -> None:
    """Checks that a tokenizer is the one with which a run or checkpoint was made.

    Raises:
      UserError: naming both tokenizers, if the fingerprints differ.
    """
    require(
        recorded.fingerprint == given.fingerprint,
        f"the tokenizer is {TokenizerRecord.of(given).describe()}, but the weights were trained with "
        f"{recorded.describe()}: the same ids mean other text; use the copy that the run keeps",
    )


def require_fits_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Checks that the model has embeddings for all ids of a tokenizer.

    Raises:
      UserError: naming both sizes, if it does not.
    """
    require(
        tokenizer.vocab_size <= model_vocab_size,
        f"the ids of tokenizer {tokenizer.name!r} exceed the model's vocabulary: it has {tokenizer.vocab_size} ids, "
        f"model.vocab_size={model_vocab_size}; set model.vocab_size={tokenizer.vocab_size} or more",
    )


def require_unicode(text: str) -> None:
    """Checks that Unicode can encode a text, so that it has no lone surrogates.

    Raises:
      UserError: naming the first lone surrogate and its place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"character {error.start} of the text is {character}, half of a surrogate pair; read the file as UTF-8"
        ) from error

"""What a tokenizer does: text to ids, each with the characters it stands for, and ids back to text."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Protocol, SupportsInt, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require

_SHOWN = 12  # characters of a fingerprint in messages


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids that frame a sequence.

    Raises:
      UserError: when there is no id that ends an answer.
    """

    pad: int  # fills a sequence up to its length, and stands where a patch or an audio frame is
    eos: tuple[int, ...]  # end an answer: training writes the first, generation stops at any
    bos: int | None = None
    sep: int | None = None

    def __post_init__(self) -> None:
        require(len(self.eos) > 0, "a tokenizer needs at least one id that ends an answer (eos)")

    @property
    def begin(self) -> int:
        """Begins a sequence: bos, or in a vocabulary without it eos, as between two documents."""
        return self.eos[0] if self.bos is None else self.bos

    @property
    def separator(self) -> int:
        """Stands between question and answer: sep, or in a vocabulary without it eos."""
        return self.eos[0] if self.sep is None else self.sep

    @property
    def framing(self) -> dict[str, int | None]:
        """What training writes into sequences. Further eos ids only tell generation where to stop."""
        return {"pad": self.pad, "bos": self.bos, "sep": self.sep, "eos": self.eos[0]}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSpans:
    """A text's token ids, and for each the half-open span of characters `text[start:stop]` it stands for.

    Spans are in order of their starts. The tokens of one character, such as the bytes of an emoji, all have its span.
    A token that stands for no character, such as a space put before the text, has an empty one. Characters that the
    tokenizer drops, such as spaces at the ends, are in no span.
    """

    ids_T: Int32[ndarray, " T"]
    find_offsets: Callable[[], Int32[ndarray, "T 2"]]  # for `offsets_T2`: most texts are read for their ids alone

    @functools.cached_property
    def offsets_T2(self) -> Int32[ndarray, "T 2"]:
        """The spans, a row a token."""
        return self.find_offsets()

    def __len__(self) -> int:
        return len(self.ids_T)

    def overlapping(self, spans: Iterable[tuple[int, int]]) -> Bool[ndarray, " T"]:
        """Which tokens stand for a character of any of these spans."""
        marked_T = np.zeros(len(self), bool)
        spans = list(spans)
        if not spans:  # offsets take as long as the rest of an example
            return marked_T
        starts_T, stops_T = self.offsets_T2.T
        for start, stop in spans:
            marked_T |= (starts_T < stop) & (stops_T > start) & (starts_T < stops_T)
        return marked_T

    def dropped(self, text: str) -> str:
        """The characters of `text`, spaces left out, that no token stands for."""
        kept = np.zeros(len(text) + 1, np.int64)
        np.add.at(kept, self.offsets_T2[:, 0], 1)
        np.add.at(kept, self.offsets_T2[:, 1], -1)
        return "".join(c for c, depth in zip(text, kept.cumsum()[:-1], strict=True) if depth == 0 and not c.isspace())


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Immutable, picklable, and safe to use from several threads.

    Tokenizers with equal fingerprints give the same ids for every text and frame sequences alike.
    """

    @property
    def kind(self) -> str:
        """Its key in `core.registries.TOKENIZERS`."""
        ...

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def vocab_size(self) -> int:
        """The largest id + 1: rows of the embedding table that it needs."""
        ...

    @property
    def special(self) -> SpecialIds: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> TokenSpans:
        """The tokens of a text that somebody wrote: what looks like a special token in it is text.

        Raises:
          UserError: when the text is not valid Unicode (a lone surrogate).
        """
        ...

    def encode_rendered(self, text: str) -> TokenSpans:
        """The tokens of what a chat template rendered: the special tokens that the vocabulary spells are read as such.

        Raises:
          UserError: when the text is not valid Unicode (a lone surrogate).
        """
        ...

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of `ids`; special ids, and ids at or past `vocab_size`, are left out."""
        ...

    def pieces(self, ids: Iterable[SupportsInt]) -> list[str]:
        """Each id as people should see it, special ones by name: for tables and pictures."""
        ...

    def save(self, folder: pathlib.Path) -> None:
        """Writes a copy into an existing folder, from which its kind's `load` makes an equal tokenizer."""
        ...


class TokenizerKind(Protocol):
    """What makes tokenizers of one kind: an entry of `core.registries.TOKENIZERS`."""

    def reads(self, path: pathlib.Path) -> bool:
        """Whether `path`, which exists, looks like a tokenizer of this kind."""
        ...

    def load(self, path: pathlib.Path, name: str | None = None) -> Tokenizer:
        """The tokenizer at `path`, called `name`, or after the path.

        Raises:
          UserError: when it cannot be read.
        """
        ...


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """What a run remembers of its tokenizer, beside the copy."""

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
    """Refuses another tokenizer than the one that a run or checkpoint was made with.

    Raises:
      UserError: when the fingerprints differ, naming both tokenizers.
    """
    require(
        recorded.fingerprint == given.fingerprint,
        f"the tokenizer is {TokenizerRecord.of(given).describe()}, but the weights were trained with "
        f"{recorded.describe()}: the same ids mean other text; use the copy that the run keeps",
    )


def require_fits_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuses a tokenizer with ids that the model has no embedding for.

    Raises:
      UserError: naming both sizes.
    """
    require(
        tokenizer.vocab_size <= model_vocab_size,
        f"the ids of tokenizer {tokenizer.name!r} exceed the model's vocabulary: it has {tokenizer.vocab_size} ids, "
        f"model.vocab_size={model_vocab_size}; set model.vocab_size={tokenizer.vocab_size} or more",
    )


def require_unicode(text: str) -> None:
    """Refuses text that no encoding of Unicode can write.

    Raises:
      UserError: naming the first such character and its place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"character {error.start} of the text is {character}, half of a surrogate pair; read the file as UTF-8"
        ) from error

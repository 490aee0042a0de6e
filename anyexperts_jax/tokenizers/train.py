"""Trains a byte-level BPE tokenizer on a corpus."""

import gzip
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Sequence

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.tokenizers.files import as_text
from anyexperts_jax.tokenizers.huggingface import CONFIG, MAIN, HuggingFaceTokenizer, require_library

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "sep_token": "<|sep|>", "eos_token": "<|eos|>"}
_BYTES = 256
_MOST = 2**20  # four times the largest published; the library allocates tables of this size first


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, name: str = "trained", special: Sequence[str] = ()
) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE tokenizer with at most `vocab_size` ids: special tokens, then bytes, then merges.

    Digits are never merged. Any text can be encoded and is decoded unchanged. The same texts give the same tokenizer.

    Args:
      texts: lines or documents; no merge crosses their boundaries.
      vocab_size: the vocabulary is smaller if the texts have too few pairs to merge.
      special: further special tokens, such as those of a chat template.

    Raises:
      UserError: if there is no text, `vocab_size` is too small, or `tokenizers` is not installed.
    """
    library = require_library()
    first = list(dict.fromkeys([*SPECIAL.values(), *special]))
    require(all(first), "a special token is empty")
    least = len(first) + _BYTES
    require(vocab_size >= least, f"vocab_size={vocab_size} must be >= {least}: {_BYTES} bytes and {comma_list(first)}")
    require(vocab_size <= _MOST, f"vocab_size={vocab_size} must be <= {_MOST}")
    made = library.Tokenizer(library.models.BPE())
    split = library.pre_tokenizers
    made.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=sorted(split.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = _NotEmpty(texts)
    made.train_from_iterator(iter(seen), trainer)
    require(seen.any, "there is no text to train a tokenizer on")
    return HuggingFaceTokenizer({MAIN: made.to_str(pretty=True), CONFIG: as_text(SPECIAL)}, name)


def read_lines(paths: Sequence[pathlib.Path]) -> Iterator[str]:
    """Yields the lines of UTF-8 text files, which are compressed if their names end in .gz.

    Raises:
      UserError: naming the file, and the line after which it is not UTF-8.
    """
    for path in paths:
        opened = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            with opened(path, "rt", encoding="utf-8", newline="\n") as file:
                for line in file:
                    yield line
                    number += 1
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 after line {number}: {error.reason}") from error
        except (OSError, EOFError, zlib.error) as error:
            told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UserError(f"cannot read {path}: {told}") from error


class _NotEmpty:
    """Passes texts on, and remembers whether one was not empty."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.any = texts, False

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.any = self.any or bool(text)
            yield text

"""Cuts long texts into windows that fit into a sequence."""

from collections.abc import Sequence

import numpy as np

from anyexperts_jax.core.errors import require
from anyexperts_jax.tokenizers.base import Tokenizer

_SPACES = (" ", "\n", "\t", "\u3000")
FRAME = 2  # tokens besides the text's: the begin token and the end token


def cut(text: str, tokenizer: Tokenizer, max_length: int) -> Sequence[tuple[int, int]]:
    """Cuts a text into consecutive spans of characters, each with at most `max_length` - FRAME tokens.

    Cuts are before white space where the second half of a stretch has some. Every stretch is tokenized anew as it will
    be when it is learned, so its length is known.

    Raises:
      UserError: when not even one character fits.
    """
    room = max_length - FRAME
    require(room >= 1, f"encoding.max_length={max_length} has no room for text; set it to {FRAME + 1} or more")
    tokens = tokenizer.encode(text)
    starts_T = tokens.offsets_T2[:, 0]
    found, begin, first = [], 0, 0
    while begin < len(text):
        past = first + room
        stop = len(text) if past >= len(starts_T) else _before_space(text, begin, int(starts_T[past]))
        while len(tokenizer.encode(text[begin:stop])) > room:
            shorter = begin + (stop - begin) * 3 // 4
            require(shorter > begin, f"one character takes more than encoding.max_length={max_length} tokens")
            stop = _before_space(text, begin, shorter)
        require(stop > begin, f"one character takes more than encoding.max_length={max_length} tokens")
        found.append((begin, stop))
        begin, first = stop, int(np.searchsorted(starts_T, stop))
    return found


def _before_space(text: str, begin: int, stop: int) -> int:
    """Returns `stop`, or the last white space before it in the second half of the window."""
    middle = begin + (stop - begin) // 2 + 1
    at = max(text.rfind(space, middle, stop + 1) for space in _SPACES)
    return at if at > begin else stop

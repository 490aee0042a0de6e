"""Patterns over the names of parameters (`models.paths`), which `train.trainable` and LoRA take.

A pattern is a path. Its parts may contain `*` (any characters within a part) or be `**` (any number of parts):
"**/router/**", "decoder/dense_*/mlp/up/kernel".
"""

import difflib
import functools
import re
from collections.abc import Iterable

from anyexperts_jax.core.errors import UserError, comma_list, shown


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that the pattern matches as a whole."""
    compiled = _compiled(pattern)
    return [name for name in names if compiled.fullmatch(name)]


def require_match(option: str, pattern: str, names: Iterable[str]) -> list[str]:
    """`matching`, but requires a match; `option` is the name of the option in the message.

    Raises:
      UserError: naming the pattern that matches nothing, and the names nearest to it.
    """
    names = list(names)
    found = matching(pattern, names)
    if not found:
        raise UserError(
            f"{option}: {shown(pattern)} matches no parameter; near it: {comma_list(_near(pattern, names))}"
        )
    return found


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    text = "/".join("\0" if part == "**" else _part(part) for part in pattern.split("/"))
    text = re.sub("^\0/", "(?:.*/)?", text)
    text = re.sub("/\0$", "(?:/.*)?", text)
    while "/\0/" in text:
        text = text.replace("/\0/", "/(?:.*/)?", 1)
    return re.compile(text.replace("\0", ".*"))


def _part(part: str) -> str:
    return "[^/]*".join(map(re.escape, part.split("*")))


def _near(pattern: str, names: list[str]) -> list[str]:
    """Up to three names that are most like the pattern, part by part."""
    wanted = [part.replace("*", "") for part in pattern.split("/") if part.replace("*", "")]

    def likeness(name: str) -> float:
        parts = name.split("/")
        return sum(max(difflib.SequenceMatcher(None, want, part).ratio() for part in parts) for want in wanted)

    return sorted(names, key=likeness, reverse=True)[:3]

"""Questions written with their evidence marked."""

import re

_MARKED = re.compile(r"\[([^\]]+)\]")


def marked(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Removes the brackets from `text`; returns the question and the spans of characters that were in brackets.

    marked("how many are [red]?") is ("how many are red?", ((13, 16),)).
    """
    plain, spans, end = "", [], 0
    for match in _MARKED.finditer(text):
        plain += text[end : match.start()]
        spans.append((len(plain), len(plain) + len(match[1])))
        plain += match[1]
        end = match.end()
    return plain + text[end:], tuple(spans)

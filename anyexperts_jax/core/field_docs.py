"""Reads the meaning of every configuration field from the comments beside it in the source.

The meaning is written once, where the field is declared. `anyexperts config` prints it, and documentation can be
generated from it.
"""

import ast
import functools
import inspect
import io
import textwrap
import tokenize


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The comments of a dataclass's fields by field name: the lines directly above a field, then those beside it.

    A comment above that is separated from the field by a blank line or another field does not belong to it.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(base))
        comments = _comments(source)
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = _own_comment(node, comments)
                if text:
                    docs[node.target.id] = text
    return docs


def class_summary(cls: type) -> str:
    """The first sentence of a class's docstring, without the full stop."""
    paragraph = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).partition(". ")[0].removesuffix(".")


def _comments(source: str) -> dict[int, tuple[bool, str]]:
    """Comments by line number: whether the comment is alone on its line, and its text."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line[: token.start[1]].strip() == ""
            found[token.start[0]] = (alone, token.string.lstrip("#").strip())
    return found


def _own_comment(node: ast.AnnAssign, comments: dict[int, tuple[bool, str]]) -> str:
    above: list[str] = []
    line = node.lineno - 1
    while line in comments and comments[line][0]:
        above.insert(0, comments[line][1])
        line -= 1
    beside = [
        comments[line][1] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in comments
    ]
    return " ".join([*above, *beside])

"""What every field of a configuration means, from the comments beside it in the source.

So the meaning stands where the field is declared and nowhere else: `anyexperts config` prints it, and documentation
can be made from it.
"""

import ast
import functools
import inspect
import io
import textwrap
import tokenize


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The meaning of every field of a dataclass that has a comment: the lines above it, then those beside it.

    A comment above that a blank line or another field parts from the field is not its own.
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
    """The first sentence of a class's docstring, without its full stop."""
    paragraph = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).partition(". ")[0].removesuffix(".")


def _comments(source: str) -> dict[int, tuple[bool, str]]:
    """By line: whether there is nothing else on it, and the comment's text."""
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

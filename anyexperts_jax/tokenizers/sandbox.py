"""Runs untrusted chat templates in a Jinja sandbox, with marks around the assistant's text."""

import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anyexperts_jax.core.errors import UserError, one_line, require

GENERATION = "generation"  # the tag around the assistant's text
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode keeps out of all text
_WANTS_MARKS = "__anyexperts_marks__"  # variable that turns marks on; no template uses its name
# Exceptions that a template may raise while it computes with its data, besides Jinja's own.
_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledTemplate:
    """A compiled template. `marks`: whether it has the tag {% generation %}."""

    template: jinja2.Template
    marks: bool

    def render(self, values: Mapping[str, Any], now: datetime.datetime, marks: bool = False) -> str:
        """Renders the template; with `marks` there are marks around the assistant's text (see `read_marks`).

        Raises:
          UserError: if the template refuses the values or fails on them.
        """
        try:
            return self.template.render({**values, "strftime_now": now.strftime, _WANTS_MARKS: marks})
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the conversation: {_line(error)}") from error
        except _FAILURES as error:
            raise UserError(f"the chat template fails: {type(error).__name__}: {_line(error)}") from error


def compile_template(source: str) -> CompiledTemplate:
    """Compiles the template `source`.

    Raises:
      UserError: with the line, if it does not compile.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "namespace": _Namespace}
    try:
        tags = environment.parse(source).find_all(jinja2.nodes.ExtensionAttribute)
        return CompiledTemplate(environment.from_string(source), any(True for _ in tags))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error


def read_marks(text: str, marked: str) -> tuple[tuple[int, int], ...]:
    """Returns the spans of `text` between the marks of `marked`, the same text with marks; empty ones are left out.

    Raises:
      UserError: if `text` itself has marks, or the marks changed the template's output in other ways.
    """
    require(_OPEN not in text and _CLOSE not in text, "the conversation holds U+FDD0 or U+FDD1, which is no text")
    spans: list[tuple[int, int]] = []
    length, begin, in_order = 0, None, True
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece == _OPEN:
            in_order = in_order and begin is None
            begin = length
        elif piece == _CLOSE:
            in_order = in_order and begin is not None
            spans.append((begin or 0, length))
            begin = None
        else:
            length += len(piece)
    unchanged = marked.replace(_OPEN, "").replace(_CLOSE, "") == text
    require(
        unchanged and in_order and begin is None,
        f"the chat template's {{% {GENERATION} %}} marks cannot be followed: they are nested, or the template "
        "changes the text around them, for example with a filter",
    )
    return tuple((start, end) for start, end in spans if start < end)


class _Generation(jinja2.ext.Extension):
    """The tags {% generation %} ... {% endgeneration %} around the assistant's text."""

    tags = {GENERATION}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements((f"name:end{GENERATION}",), drop_needle=True)
        call = self.call_method("_said", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _said(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{_OPEN}{text}{_CLOSE}" if context.get(_WANTS_MARKS) else text


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without private names, which would lead out of the sandbox."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the private name {name!r}")
        super().__setitem__(name, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Formats JSON without HTML escapes, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _line(error: BaseException) -> str:
    return one_line(error)

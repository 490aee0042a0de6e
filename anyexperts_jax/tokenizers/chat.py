"""Chat templates: render conversations as text, and find the characters and tokens of the assistant's turns.

Templates come with published models. They are Jinja, run in a sandbox with transformers' additions (`tojson`,
`raise_exception`, `strftime_now`, `{% generation %}`, `{% break %}`). They are untrusted, so they only see plain data.
"""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Bool
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of
from anyexperts_jax.tokenizers.base import Tokenizer, TokenSpans
from anyexperts_jax.tokenizers.huggingface import DEFAULT_TEMPLATE, HuggingFaceTokenizer
from anyexperts_jax.tokenizers.sandbox import GENERATION, CompiledTemplate, compile_template, read_marks

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
MEDIA_KEYS = (
    "image",
    "audio",
    "video",
    "image_url",
    "input_audio",
    "path",
    "url",
)  # templates only test whether these parts exist
_MEDIUM = "<medium>"
_SCALARS: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
}  # exact types only, since a subclass may override str()

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the half-open spans of the assistant's turns, in order.

    A turn is what a model has to generate after the generation prompt: the answer and its end.
    """

    text: str
    assistant: tuple[Span, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedChat:
    """A conversation as tokens. `assistant_T` marks the tokens of the assistant's turns."""

    text: str
    tokens: TokenSpans
    assistant_T: Bool[ndarray, " T"]


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A template with the values for rendering it.

    Attributes:
      source: the Jinja source.
      special_tokens: texts that the template can use by name: "bos_token", "eos_token" and so on.
      control_tokens: texts of all special tokens; spaces after one that ends a turn do not belong to the turn.
      now: the time of `strftime_now`; None: the current time, which makes runs irreproducible.

    Raises:
      UserError: with the line, if the template does not compile.
    """

    source: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    control_tokens: tuple[str, ...] = ()
    now: datetime.datetime | None = None

    def __post_init__(self) -> None:
        _ = self._compiled  # compiled now, so that an invalid template is refused now

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, dict(self.special_tokens), self.control_tokens, self.now)

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, name: str = DEFAULT_TEMPLATE, now: datetime.datetime | None = None
    ) -> "ChatTemplate":
        """Returns a template that comes with a tokenizer.

        Raises:
          UserError: if it has none with this name.
        """
        templates = tokenizer.chat_templates if isinstance(tokenizer, HuggingFaceTokenizer) else {}
        require(bool(templates), f"tokenizer {tokenizer.name!r} comes without a chat template; give one")
        require_one_of(f"chat template of tokenizer {tokenizer.name!r}", name, templates)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        return cls(templates[name], tokenizer.special_tokens, tokenizer.control_tokens, now)

    @property
    def marks_the_assistant(self) -> bool:
        """Whether the template marks the assistant's turns with {% generation %}."""
        return self._compiled.marks

    def render(self, messages: Sequence[Any], add_generation_prompt: bool = False, **extra: Any) -> Rendered:
        """Renders a conversation, and finds the spans of the assistant's turns.

        If the template marks turns, its marks are used. Otherwise the messages before a turn, with a generation prompt,
        and those up to and with the turn are rendered too: the turn reaches from the end of the one to that of the
        other.

        Args:
          messages: objects with a "role", one of ROLES, and "content": a text, or parts such as
            {"type": "text", "text": ...}.
          add_generation_prompt: whether to end with the beginning of the assistant's next turn; the conversation may
            then have no turn of the assistant yet.
          extra: further values for the template, such as `tools`.

        Raises:
          UserError: if a message is malformed, the assistant has no turn, the template refuses the conversation, or
            the assistant's turns cannot be found in its text.
        """
        plain = _plain_messages(messages)
        turns = [i for i, message in enumerate(plain) if message["role"] == ASSISTANT]
        require(
            bool(turns) or add_generation_prompt,
            f"the conversation has no turn of the {ASSISTANT}, only {comma_list(m['role'] for m in plain)}: "
            "there is nothing to learn in it",
        )
        render = functools.partial(self._text, _plain("values for the template", extra), self.now or _now())
        text = render(plain, add_generation_prompt)
        if not turns:
            return Rendered(text, ())
        if self.marks_the_assistant:
            spans = read_marks(text, render(plain, add_generation_prompt, marks=True))
            require(bool(spans), f"the chat template marks no turn of the {ASSISTANT} with {{% {GENERATION} %}}")
            return Rendered(text, spans)
        return Rendered(text, tuple(self._by_prefixes(render, plain, turns, text)))

    def write(self, messages: Sequence[Any], add_generation_prompt: bool = False, **extra: Any) -> str:
        """Renders a conversation as a prompt, without finding the assistant's turns.

        Templates may render earlier turns differently from the next one, for example without their thoughts.

        Args:
          messages, extra: as for `render`.

        Raises:
          UserError: if a message is malformed, or the template refuses the conversation.
        """
        values = _plain("values for the template", extra)
        return self._text(values, self.now or _now(), _plain_messages(messages), add_generation_prompt)

    def _by_prefixes(self, render: Any, messages: list[dict[str, Any]], turns: Sequence[int], text: str) -> list[Span]:
        spans = []
        for i in turns:
            before, upto = render(messages[:i], True), render(messages[: i + 1], False)
            for prefix, which in ((before, "before"), (upto, "up to and with")):
                require(
                    text.startswith(prefix),
                    "the chat template does not let the assistant's turns be found: what it makes of the messages "
                    f"{which} number {i} is not the beginning of the whole; put the assistant's turns between "
                    f"{{% {GENERATION} %}} and {{% end{GENERATION} %}} in it",
                )
            require(len(before) < len(upto), f"the chat template writes nothing for message {i} of the assistant")
            spans.append((len(before), self._without_space_after_end(text, len(before), len(upto))))
        return spans

    def _without_space_after_end(self, text: str, start: int, stop: int) -> int:
        """Moves `stop` before white space that follows a special token, which a model does not generate."""
        said = text[start:stop].rstrip()
        return start + len(said) if said.endswith(self.control_tokens) else stop

    def _text(
        self,
        extra: Mapping[str, Any],
        now: datetime.datetime,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        marks: bool = False,
    ) -> str:
        values = {"tools": None, "documents": None, **self.special_tokens, **extra}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._compiled.render(values, now, marks)

    @functools.cached_property
    def _compiled(self) -> CompiledTemplate:
        return compile_template(self.source)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Any],
    add_generation_prompt: bool = False,
    **extra: Any,
) -> EncodedChat:
    """Encodes a conversation, and marks the tokens of the assistant's turns.

    A token is marked if one of its characters belongs to a turn. The ids equal those of transformers'
    `apply_chat_template`; as there, the spelling of a special token in a message becomes that token.

    Args:
      add_generation_prompt, extra: as for `ChatTemplate.render`.

    Raises:
      UserError: as for `ChatTemplate.render`, or if the tokenizer drops the assistant's whole text.
    """
    rendered = template.render(messages, add_generation_prompt, **extra)
    tokens = tokenizer.encode_rendered(rendered.text)
    assistant_T = tokens.overlapping(rendered.assistant)
    require(
        bool(assistant_T.any()) or not rendered.assistant,
        f"tokenizer {tokenizer.name!r} has no token for anything that the {ASSISTANT} says",
    )
    return EncodedChat(rendered.text, tokens, assistant_T)


def _now() -> datetime.datetime:
    return datetime.datetime.now()


def _plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    plain = [_plain_message(i, message) for i, message in enumerate(messages)]
    require(bool(plain), "the conversation is empty; it needs at least one message")
    return plain


def _plain_message(index: int, message: Any) -> dict[str, Any]:
    """Returns the message as plain data without empty keys. A medium becomes one word, all that templates see of it."""
    where = f"message {index}"
    require(isinstance(message, Mapping), f"{where} is a {type(message).__name__}, not an object with role and content")
    held = {key: value for key, value in message.items() if value is not None}
    require("role" in held, f"{where} has no role; valid: {comma_list(ROLES)}")
    require_one_of(f"{where}: role", held["role"], ROLES)
    require("content" in held or held["role"] == ASSISTANT, f"{where} of the {held['role']} has no content")
    content = held.get("content", "")
    if not isinstance(content, str):
        parts = isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content)
        require(parts, f"{where}: its content is a {type(content).__name__}, neither a text nor a list of parts")
        held["content"] = [{key: _medium(key, value) for key, value in part.items()} for part in content]
    return {key: _plain(where, value) for key, value in held.items()}


def _medium(key: str, value: Any) -> Any:
    return _MEDIUM if key in MEDIA_KEYS and not isinstance(value, str) else value


def _plain(where: str, value: Any) -> Any:
    """Rebuilds `value` from JSON's types, since any other object could lead out of the sandbox."""
    if isinstance(value, bool | None):
        return value
    for kind, plain in _SCALARS.items():
        if isinstance(value, kind):
            return plain(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(where, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(where, item) for item in value]
    raise UserError(f"{where} holds a {type(value).__name__}, which is neither text, number, list nor object")

"""Chat templates: a conversation as text, and which of its characters, so which tokens, are the assistant's.

Templates are those that published models ship: Jinja, run in a sandbox with what transformers offers them (`tojson`,
`raise_exception`, `strftime_now`, `{% generation %}`, `{% break %}`). They come from strangers, so they see nothing
but plain data.
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
)  # a template asks only if they are there
_MEDIUM = "<medium>"
_SCALARS: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
}  # a subclass may override what str() gives

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the half-open spans of it that the assistant says, in order.

    A turn is what a model has to write after the generation prompt: the answer and what ends it.
    """

    text: str
    assistant: tuple[Span, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedChat:
    """A conversation as tokens. `assistant_T` marks those of the assistant's turns."""

    text: str
    tokens: TokenSpans
    assistant_T: Bool[ndarray, " T"]


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A template with what it is rendered with.

    Attributes:
      source: in Jinja.
      special_tokens: texts that the template can use by name: "bos_token", "eos_token" and so on.
      control_tokens: texts of all special tokens: spaces after one that ends a turn are not the assistant's.
      now: what `strftime_now` tells; None: the time of day, with which no run can be repeated.

    Raises:
      UserError: when the template does not compile, with the line.
    """

    source: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    control_tokens: tuple[str, ...] = ()
    now: datetime.datetime | None = None

    def __post_init__(self) -> None:
        _ = self._compiled  # made now, so that a broken template is refused now

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, dict(self.special_tokens), self.control_tokens, self.now)

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, name: str = DEFAULT_TEMPLATE, now: datetime.datetime | None = None
    ) -> "ChatTemplate":
        """The template that comes with a tokenizer.

        Raises:
          UserError: when it has none of this name.
        """
        templates = tokenizer.chat_templates if isinstance(tokenizer, HuggingFaceTokenizer) else {}
        require(bool(templates), f"tokenizer {tokenizer.name!r} comes without a chat template; give one")
        require_one_of(f"chat template of tokenizer {tokenizer.name!r}", name, templates)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        return cls(templates[name], tokenizer.special_tokens, tokenizer.control_tokens, now)

    @property
    def marks_the_assistant(self) -> bool:
        """Whether the template itself says what the assistant's turns are, by {% generation %}."""
        return self._compiled.marks

    def render(self, messages: Sequence[Any], add_generation_prompt: bool = False, **extra: Any) -> Rendered:
        """The conversation as text, with the spans of the assistant's turns.

        Where the template marks them, they are its marks. Elsewhere a turn goes from the end of what the template
        makes of the messages before it, with a generation prompt, to the end of what it makes of those up to it.

        Args:
          messages: each an object with a "role", one of ROLES, and "content": a text, or parts such as
            {"type": "text", "text": ...}.
          add_generation_prompt: ends with what comes before the assistant's next turn; then the conversation may have
            no turn of the assistant's yet.
          extra: further values for the template, such as `tools`.

        Raises:
          UserError: when a message is malformed, there is no turn of the assistant's, the template refuses the
            conversation, or its text does not let the assistant's turns be found.
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
        """The conversation as text alone, for a prompt: the assistant's turns need not be found in it.

        Templates may write earlier turns otherwise than the one to come, as those that leave out old thoughts.

        Args:
          messages, extra: as for `render`.

        Raises:
          UserError: when a message is malformed, or the template refuses the conversation.
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
        """`stop` moved before the white space that follows a special token, which nobody generates."""
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
    """The conversation as tokens, with those of the assistant's turns marked.

    A token is the assistant's when one of its characters is. The ids are those of transformers' `apply_chat_template`.
    Like there, a special token that a message spells becomes that token.

    Args:
      add_generation_prompt, extra: as for `ChatTemplate.render`.

    Raises:
      UserError: as `ChatTemplate.render`; or when the tokenizer drops all that the assistant says.
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
    """The message as plain data without empty keys. A medium becomes one word: templates see no more of it."""
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
    """Rebuilds `value` from JSON's types: any other object could be a way out of the sandbox."""
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

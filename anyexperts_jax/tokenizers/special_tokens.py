"""Reads, from the files beside `tokenizer.json`, which tokens of a Hugging Face tokenizer are special."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from anyexperts_jax.core.errors import UserError, require

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class Declared:
    """The tokens that the files declare.

    Attributes:
      named: texts of the special tokens by name, as chat templates see them: "eos_token" and so on.
      added: tokens with ids and flags, which `tokenizer.json` may lack.
      extra: further special tokens.
      eos_ids, pad_id, bos_id: those of generation_config.json.
    """

    named: Mapping[str, str]
    added: Mapping[int, Mapping[str, Any]]
    extra: tuple[str, ...]
    eos_ids: tuple[int, ...]
    pad_id: int | None
    bos_id: int | None


def declared(config: Mapping[str, Any], token_map: Mapping[str, Any], generation: Mapping[str, Any]) -> Declared:
    """Reads tokenizer_config.json, special_tokens_map.json and generation_config.json, in this order of precedence.

    Raises:
      UserError: naming the file and a value that is neither a token nor an id.
    """
    sources = (("special_tokens_map.json", token_map), ("tokenizer_config.json", config))
    tokens = {
        key: token for name, source in sources for key, value in source.items() for token in _token(name, key, value)
    }
    eos_ids = generation.get("eos_token_id")
    listed = eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
    return Declared(
        named={key: tokens[key] for key in NAMED if key in tokens},
        added={_id("added_tokens_decoder", key): _flags(value) for key, value in _added(config).items()},
        extra=tuple(
            dict.fromkeys([*(token for key, token in tokens.items() if key not in NAMED), *_extra(token_map, config)])
        ),
        eos_ids=tuple(_id("eos_token_id", value) for value in listed),
        pad_id=_id_or_none("pad_token_id", generation),
        bos_id=_id_or_none("bos_token_id", generation),
    )


def _token(name: str, key: str, value: Any) -> Iterator[str]:
    """Yields the text of a token under a key such as "eos_token": a string, or an object with its content."""
    if not key.endswith("_token") or value is None or isinstance(value, bool):  # add_bos_token is a boolean
        return
    content = value.get("content") if isinstance(value, dict) else value
    require(_is_token(content), f"{name}: {key}={value!r} is not a token")
    yield str(content)


def _is_token(content: Any) -> bool:
    """Whether it is a text that UTF-8 can encode."""
    return isinstance(content, str) and bool(content) and content.encode(errors="replace").decode() == content


def _extra(*sources: Mapping[str, Any]) -> Iterator[str]:
    """Yields special tokens that have no name."""
    for source in sources:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(key) or ()
            require(isinstance(values, list | tuple | dict), f"{key}={values!r} is not a list of tokens")
            for value in values.values() if isinstance(values, dict) else values:
                yield from _token(key, "extra_token", value)


def _added(config: Mapping[str, Any]) -> Mapping[str, Any]:
    added = config.get("added_tokens_decoder") or {}
    require(isinstance(added, dict), f"tokenizer_config.json: added_tokens_decoder is a {type(added).__name__}")
    return added


def _flags(value: Any) -> dict[str, Any]:
    content = value.get("content") if isinstance(value, dict) else None
    require(_is_token(content), f"tokenizer_config.json: added_tokens_decoder holds {value!r}, which is not a token")
    return {"content": content, **{name: bool(value[name]) for name in _FLAGS if name in value}}


def _id_or_none(key: str, values: Mapping[str, Any]) -> int | None:
    return None if values.get(key) in (None, -1) else _id(key, values[key])  # the first Llama wrote -1 for none


def _id(key: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {value!r} is not a token id") from error
    require(number >= 0, f"{key}: {value!r} is not a token id")
    return number

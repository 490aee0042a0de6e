"""Converts the tokenizer in a GGUF file's metadata to the files of a Hugging Face tokenizer.

Only byte-level BPE is supported (`tokenizer.ggml.model` "gpt2"). The file does not say how text is split before the
merges, but only names one of llama.cpp's methods; _SPLITS has those known here.
"""

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anyexperts_jax.core.errors import UserError, require, require_one_of
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.tokenizers.files import as_text

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "seperator": "sep_token"}  # GGUF's spelling
_NAMED |= {"separator": "sep_token", "padding": "pad_token"}
_MORE_EOS = ("eot", "eom")  # end of turn, end of message
_WORDS = (  # words with the character before them, up to `{}` digits, punctuation, lines, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def read_gguf(path: pathlib.Path) -> tuple[dict[str, str], str]:
    """Returns the files of the tokenizer in a GGUF file, and the model's name.

    Raises:
      UserError: if `gguf` or `tokenizers` is not installed, the file is damaged, or its tokenizer has another kind.
    """
    found = _metadata(path)
    model = found.get("tokenizer.ggml.model")
    require(model is not None, "there is no tokenizer in the GGUF file (tokenizer.ggml.model)")
    require(
        model == "gpt2",
        f'tokenizer.ggml.model="{model}" cannot be read, only "gpt2" (byte-level BPE); use the model\'s tokenizer.json',
    )
    for key in ("tokens", "token_type", "merges"):
        require(f"tokenizer.ggml.{key}" in found, f"the GGUF file has no tokenizer.ggml.{key}")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    require(len(set(tokens)) == len(tokens), "tokenizer.ggml.tokens holds a token twice")
    require(len(kinds) == len(tokens), f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    named = {}
    for key, name in _NAMED.items():
        id = found.get(f"tokenizer.ggml.{key}_token_id")
        if id is not None:
            require(id < len(tokens), f"tokenizer.ggml.{key}_token_id={id} is not in the vocabulary of {len(tokens)}")
            named[name] = tokens[id]
    config = named | ({"chat_template": found[key]} if (key := "tokenizer.chat_template") in found else {})
    eos = [found[key] for key in (f"tokenizer.ggml.{name}_token_id" for name in _MORE_EOS) if key in found]
    files = {
        "tokenizer.json": _build(found).to_str(),
        "tokenizer_config.json": as_text(config),
        "generation_config.json": as_text({"eos_token_id": eos}),
    }
    return files, str(found.get("general.name", path.stem))


def _metadata(path: pathlib.Path) -> dict[str, Any]:
    gguf = require_package("gguf", "text", "GGUF files need")
    try:
        fields = gguf.GGUFReader(path).fields
        wanted = (name for name in fields if name.startswith("tokenizer.") or name == "general.name")
        return {name: fields[name].contents() for name in wanted}
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, OverflowError) as error:  # NumPy raises these for a file that ends too early
        raise UserError(f"is not a complete GGUF file: {error}") from error


def _build(found: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    from anyexperts_jax.tokenizers.huggingface import require_library

    library = require_library()
    split = found.get("tokenizer.ggml.pre", "gpt-2")
    require_one_of("tokenizer.ggml.pre", split, _SPLITS)
    vocabulary = {token: id for id, token in enumerate(found["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in found["tokenizer.ggml.merges"]]
    for pair in merges:  # the library would raise a plain Exception
        fits = len(pair) == 2 and vocabulary.keys() >= {*pair, "".join(pair)}
        require(fits, f"tokenizer.ggml.merges holds {' '.join(pair)!r}, which does not fit tokenizer.ggml.tokens")
    made = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
    made.pre_tokenizer = _splitter(library.pre_tokenizers, split)
    made.decoder = library.decoders.ByteLevel()
    if split == "qwen2":
        made.normalizer = library.normalizers.NFC()
    kinds = list(zip(vocabulary, found["tokenizer.ggml.token_type"], strict=True))
    token = library.AddedToken
    made.add_special_tokens([token(t, special=True, normalized=False) for t, kind in kinds if kind == _CONTROL])
    made.add_tokens([token(t, special=False, normalized=False) for t, kind in kinds if kind == _USER_DEFINED])
    return made


def _splitter(library: Any, split: str) -> Any:
    """Returns the pre-tokenizer, which cuts a text into pieces that are merged separately, and spells their bytes."""
    by_words = library.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "gpt-2":
        return by_words
    if split == "smollm":
        return library.Sequence([library.Digits(individual_digits=True), by_words])
    from tokenizers import Regex

    pattern = Regex(_WORDS.format("{1,3}" if split == "llama-bpe" else ""))
    spelled = library.ByteLevel(add_prefix_space=False, use_regex=False)
    return library.Sequence([library.Split(pattern, behavior="isolated"), spelled])

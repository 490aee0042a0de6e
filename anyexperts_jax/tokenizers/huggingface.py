"""Hugging Face tokenizers: a `tokenizer.json`, and files beside it with special tokens and a chat template.

The package `tokenizers` (extra `text`) is needed. Ids equal those of transformers. Offsets include the spaces that
belong to a token, so that spans of evidence are exact.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, SupportsInt

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.tokenizers.base import SpecialIds, TokenSpans, require_unicode
from anyexperts_jax.tokenizers.files import parse_object, read_text
from anyexperts_jax.tokenizers.special_tokens import Declared, declared

if TYPE_CHECKING:
    import tokenizers

KIND = "huggingface"
MAIN = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"  # for models with media; transformers' processor reads it
FILES = (MAIN, CONFIG, "special_tokens_map.json", "generation_config.json", TEMPLATE, PROCESSOR_TEMPLATE)
DEFAULT_TEMPLATE = "default"

_UNUSED = ("version", "truncation", "padding", "post_processor")  # parts of tokenizer.json that do not affect ids here
_ELSEWHERE = {
    "tokenizer.model": "SentencePiece",
    "vocab.json": "a vocabulary and merges",
    "vocab.txt": "WordPiece",
}


def require_library() -> Any:
    """Returns the package `tokenizers`.

    Raises:
      UserError: if it is not installed; the message says how to install it.
    """
    return require_package("tokenizers", "text")


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer:
    """A tokenizer made from the texts of its files.

    Attributes:
      files: the texts of those of FILES that exist, by file name.
      name: its name in messages and tables.

    Raises:
      UserError: if `tokenizers` is not installed, a file is damaged, no token ends an answer, or an added token gets
        another id than in the files.
    """

    files: Mapping[str, str]
    name: str

    def __post_init__(self) -> None:
        require(MAIN in self.files, f"there is no {MAIN}")
        _ = self._text  # built now, so that damaged files are refused now
        self._require_declared_ids()
        self._require_unknown_token()
        for id in self._special_ids:
            require(
                id < self.vocab_size, f"the special token id {id} is not in the vocabulary of {self.vocab_size} ids"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (dict(self.files), self.name)

    @classmethod
    def reads(cls, path: pathlib.Path) -> bool:
        """Whether it is a tokenizer.json, a GGUF file, or a folder that has, or should have, the former."""
        if path.is_dir():
            return any((path / name).exists() for name in (*FILES, *_ELSEWHERE))
        return path.suffix in (".json", ".gguf")

    @classmethod
    def load(cls, path: pathlib.Path, name: str | None = None) -> "HuggingFaceTokenizer":
        """Loads the tokenizer of a folder, of a tokenizer.json with the files beside it, or of a GGUF file.

        Raises:
          UserError: naming the file, if there is none or it is damaged.
        """
        try:
            if path.suffix == ".gguf":
                from anyexperts_jax.tokenizers.gguf import read_gguf

                files, found = read_gguf(path)
                return cls(files, name or found)
            folder, main = (path, path / MAIN) if path.is_dir() else (path.parent, path)
            require(main.is_file(), _missing(folder))
            files = {name: read_text(folder / name) for name in FILES[1:] if (folder / name).is_file()}
            return cls({MAIN: read_text(main), **files}, name or folder.resolve().name)
        except UserError as error:
            raise UserError(f"tokenizer {path}: {error}") from error

    @property
    def kind(self) -> str:
        return KIND

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._text.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special(self) -> SpecialIds:
        """The ids of the named tokens, or those of generation_config.json if the files name none. pad may be eos."""
        declared = self._declared
        ids = {name: self._id_of(token) for name, token in declared.named.items()}
        own = [ids["eos_token"]] if "eos_token" in ids else []
        eos = tuple(dict.fromkeys([*own, *declared.eos_ids]))
        require(bool(eos), f"no token ends an answer: set eos_token in {CONFIG}")
        return SpecialIds(
            pad=ids.get("pad_token", eos[0] if declared.pad_id is None else declared.pad_id),
            eos=eos,
            bos=ids.get("bos_token", declared.bos_id),
            sep=ids.get("sep_token"),
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that affects ids and sequences, but not of how the files are formatted."""
        added = {id: [token.content, token.special] for id, token in self._text.get_added_tokens_decoder().items()}
        parts = {"tokenizer": _canonical(self._description), "added": added, "special": self.special.framing}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """The texts of the named special tokens, as chat templates see them: "eos_token" and so on."""
        return self._declared.named

    @functools.cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts of all special tokens."""
        return tuple(token.content for token in self._text.get_added_tokens_decoder().values() if token.special)

    @functools.cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """The sources of the chat templates by name, usually one named DEFAULT_TEMPLATE."""
        if TEMPLATE in self.files:
            return {DEFAULT_TEMPLATE: self.files[TEMPLATE]}
        found = self._json(PROCESSOR_TEMPLATE).get("chat_template") or self._json(CONFIG).get("chat_template")
        if isinstance(found, str):
            return {DEFAULT_TEMPLATE: found}
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in found or ()}
        except (TypeError, KeyError) as error:
            raise UserError(f"{CONFIG}: chat_template is neither a text nor a list of names and templates") from error

    def encode(self, text: str) -> TokenSpans:
        return self._spans(self._text, text)

    def encode_rendered(self, text: str) -> TokenSpans:
        return self._spans(self._rendered, text)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self._special_ids]
        return str(self._text.decode(kept, skip_special_tokens=True))

    def pieces(self, ids: Iterable[SupportsInt]) -> list[str]:
        """Returns each token's text; a token that is part of a character gives its bytes in hexadecimal."""
        tokens = [self._text.id_to_token(i) or f"<{i}>" for i in map(int, ids)]
        if not self._byte_level:
            return [token.replace("▁", " ") for token in tokens]
        decoder = require_library().decoders.ByteLevel()
        byte_of = {spelling: byte for byte, spelling in _byte_spellings().items()}
        read = [token if token in self.control_tokens else decoder.decode([token]) for token in tokens]
        return [
            "".join(f"<{byte_of[c]:02X}>" for c in token) if "\ufffd" in text and byte_of.keys() >= set(token) else text
            for token, text in zip(tokens, read, strict=True)
        ]

    def save(self, folder: pathlib.Path) -> None:
        """Writes the files unchanged, so that other tools can read the copy too."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")

    # How it is made

    def _json(self, name: str) -> dict[str, Any]:
        return parse_object(name, self.files[name]) if name in self.files else {}

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        return self._json(MAIN)

    @functools.cached_property
    def _declared(self) -> Declared:
        return declared(*(self._json(name) for name in FILES[1:4]))

    @functools.cached_property
    def _text(self) -> "tokenizers.Tokenizer":
        """The library's tokenizer for users' texts: the spelling of a special token is text."""
        made = self._make()
        made.encode_special_tokens = True
        return made

    @functools.cached_property
    def _rendered(self) -> "tokenizers.Tokenizer":
        """The library's tokenizer for rendered conversations."""
        return self._make()

    def _make(self) -> "tokenizers.Tokenizer":
        """Builds it without truncation, padding and post-processor; the last would also trim offsets."""
        library = require_library()
        description = {**self._description, "truncation": None, "padding": None, "post_processor": None}
        try:
            made = library.Tokenizer.from_buffer(json.dumps(description).encode())
        except ValueError as error:
            raise UserError(f"{MAIN} is broken: {error}") from error
        declared, known = self._declared, {token.content for token in made.get_added_tokens_decoder().values()}
        made.add_tokens(
            [
                library.AddedToken(**flags)
                for _, flags in sorted(declared.added.items())
                if flags["content"] not in known
            ]
        )
        special = dict.fromkeys([*declared.named.values(), *declared.extra])
        made.add_special_tokens([library.AddedToken(text, special=True, normalized=False) for text in special])
        return made

    def _spans(self, made: "tokenizers.Tokenizer", text: str) -> TokenSpans:
        try:  # without offsets, which few callers need: it takes five sixths of the time
            (found,) = made.encode_batch_fast([text], add_special_tokens=False)
        except TypeError:
            require_unicode(text)
            raise
        self._require_tokens_for(text)
        ids_T = np.array(found.ids, np.int32)
        return TokenSpans(ids_T, lambda: self._offsets(made, text, ids_T))

    def _offsets(self, made: "tokenizers.Tokenizer", text: str, ids_T: Int32[ndarray, " T"]) -> Int32[ndarray, "T 2"]:
        """Returns the library's offsets. A space that the tokenizer puts before the text gets an empty span."""
        found = made.encode(text, add_special_tokens=False).offsets
        offsets_T2 = np.array(found, np.int32).reshape(-1, 2)
        for i in np.nonzero(ids_T == self._space_id)[0].tolist():
            start = int(offsets_T2[i, 0])
            if start < len(text) and not text[start].isspace() and text[start] != self._space:
                offsets_T2[i, 1] = start
        return offsets_T2

    def _id_of(self, token: str) -> int:
        """Returns the id of a token that is in the vocabulary."""
        id = self._text.token_to_id(token)
        assert id is not None
        return id

    @property
    def _space(self) -> str:
        """The vocabulary's spelling of a space."""
        return "Ġ" if self._byte_level else "▁"

    @functools.cached_property
    def _space_id(self) -> int:
        id = self._text.token_to_id(self._space)
        return -1 if id is None else id

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        special = self.special
        return frozenset(i for i in (special.pad, special.bos, special.sep, *special.eos) if i is not None)

    @functools.cached_property
    def _byte_level(self) -> bool:
        parts = [self._description.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
        return '"ByteLevel"' in json.dumps(parts)

    # What must hold

    def _require_declared_ids(self) -> None:
        """Checks the ids of added tokens, which the library renumbers in a vocabulary with gaps, unlike the weights."""
        listed = self._description.get("added_tokens") or []
        wanted = {token["content"]: token["id"] for token in listed if isinstance(token, dict) and "id" in token}
        wanted |= {flags["content"]: id for id, flags in self._declared.added.items()}
        for content, id in wanted.items():
            found = self._text.token_to_id(content)
            require(found == id, f"the added token {content!r} has id {id} in the files, but would be read as {found}")

    def _require_unknown_token(self) -> None:
        """Requires a token for unknown text. Without one, some models fail, and BPE drops it with wrong offsets."""
        model, vocabulary = self._description["model"], self._text.get_vocab(with_added_tokens=False)
        kind, unknown = model.get("type", "BPE"), model.get("unk_token")
        if kind == "Unigram":
            known = model.get("unk_id") is not None or bool(model.get("byte_fallback"))
        elif kind == "BPE" and unknown is None:
            known = bool(model.get("byte_fallback")) or self._byte_level
        else:
            known = unknown in vocabulary
        require(
            known,
            f"{MAIN}: its {kind} model has no token for what is not in its vocabulary (unk_token {unknown!r}, no "
            "bytes), so it would lose characters",
        )

    @functools.cached_property
    def _missing_bytes(self) -> re.Pattern[bytes] | None:
        """Finds the bytes without a token in a byte-level vocabulary; published ones lack rare control characters."""
        if not self._byte_level or self._description["model"].get("unk_token") is not None:
            return None
        vocabulary = self._text.get_vocab(with_added_tokens=False)
        missing = bytes(byte for byte, spelling in _byte_spellings().items() if spelling not in vocabulary)
        return re.compile(b"[" + re.escape(missing) + b"]") if missing else None

    def _require_tokens_for(self, text: str) -> None:
        """Refuses text with a character that BPE would drop, since the spans after it would be wrong."""
        if self._missing_bytes is None:
            return
        normalizer = self._text.normalizer
        written = (normalizer.normalize_str(text) if normalizer else text).encode()
        found = self._missing_bytes.search(written)
        if found is not None:
            place = sum(byte & 0xC0 != 0x80 for byte in written[: found.start() + 1]) - 1
            character = f"U+{ord(written.decode()[place]):04X}"
            raise UserError(f"tokenizer {self.name!r} has no token for character {place} of the text, {character}")


def _byte_spellings() -> dict[int, str]:
    """Returns byte-level vocabularies' spelling of UTF-8 bytes: visible ones unchanged, others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    spelled = {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    never = (0xC0, 0xC1, *range(0xF5, 0x100))  # never occur in UTF-8
    return {byte: spelling for byte, spelling in spelled.items() if byte not in never}


def _missing(folder: pathlib.Path) -> str:
    found = [f"{name} ({what})" for name, what in _ELSEWHERE.items() if (folder / name).exists()]
    if not found:
        return f"there is no {MAIN}"
    return (
        f"there is no {MAIN}, only {comma_list(found)}: write one with transformers, "
        f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _canonical(description: Mapping[str, Any]) -> dict[str, Any]:
    """Removes what does not affect ids from tokenizer.json, and brings it to the form of the newest `tokenizers`."""
    kept = {key: value for key, value in description.items() if key not in (*_UNUSED, "added_tokens")}
    model = {key: value for key, value in kept["model"].items() if value not in (None, False, "")}
    if "merges" in model:
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = hashlib.sha256(json.dumps(merges).encode()).hexdigest()
    return {**kept, "model": model}

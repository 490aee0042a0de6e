"""Describes a tokenizer, and the tokens of a text."""

from anyexperts_jax.core.errors import comma_list
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.tokenizers.base import Tokenizer, TokenSpans


def describe(tokenizer: Tokenizer) -> list[str]:
    """Returns lines that describe it: name, kind, size, fingerprint, special ids with their spelling."""
    special = tokenizer.special
    ids = {"pad": special.pad, "bos": special.bos, "sep": special.sep}
    known = {name: id for name, id in ids.items() if id is not None}
    named = [*known.items(), *(("eos", id) for id in special.eos)]
    spelled = tokenizer.pieces([id for _, id in named])
    missing = [name for name, id in ids.items() if id is None]
    lines = [
        f"{tokenizer.name}: {tokenizer.kind}, {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}",
        "special: "
        + comma_list(f"{name} {id} {text}" for (name, id), text in zip(named, spelled, strict=True))
        + (f"; none: {comma_list(missing)}, eos stands in" if missing else ""),
    ]
    templates = getattr(tokenizer, "chat_templates", {})
    return [*lines, f"chat templates: {comma_list(templates)}"] if templates else lines


def token_table(tokenizer: Tokenizer, tokens: TokenSpans) -> TextTable:
    """Returns a table with a row per token: its index, id, spelling and characters."""
    rows = []
    spelled = tokenizer.pieces(tokens.ids_T)
    for i, (id, piece, span) in enumerate(zip(tokens.ids_T, spelled, tokens.offsets_T2, strict=True)):
        characters = "none" if span[0] == span[1] else f"{span[0]} to {span[1]}"
        rows.append((str(i), str(id), repr(piece)[1:-1], characters))
    return TextTable("Tokens of the text", ("#", "id", "token", "characters"), tuple(rows), names=4)


def summary(text: str, tokens: TokenSpans) -> str:
    """Counts the tokens of the text, and names the characters that no token covers."""
    size, count = len(text.encode()), len(tokens)
    ratio = f" ({size / count:.2f} bytes a token)" if count else ""
    dropped = tokens.dropped(text)
    told = f"; {len(dropped)} characters are in no token: {dropped!r}" if dropped else ""
    return f"{count} tokens for {len(text)} characters, {size} bytes{ratio}{told}"

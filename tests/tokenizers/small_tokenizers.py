"""Small tokenizers of the kinds that published models use, trained here on a few lines."""

import functools
import json

from anyexperts_jax.tokenizers.huggingface import HuggingFaceTokenizer

CORPUS = (
    "Hello world, the café costs 12 euros and the token is worth its expert.",
    "What is in the picture? A cat sits on the mat; the mat is red.",
    "def main():\n    return 12 + 34\n",
    "Größe, naïve, 你好, привет: the answer is 42.",
)
# Texts with characters of one to four bytes, clusters of several, spaces everywhere, digits and no text at all.
TEXTS = (
    *CORPUS,
    "",
    " ",
    "  two  spaces  ",
    "🎉👩‍👩‍👧 e\u0301 ﬁ",
    "line\n\n\tline\r\n",
    "unseen: ßØ漢字 ½",
    "12345 6.7",
)


def byte_level(special=("<|pad|>", "<|bos|>", "<|sep|>", "<|eos|>"), vocab_size=400, trim=False):
    """Trains byte-level BPE as in GPT-2, Llama 3 and Qwen; with `trim`, offsets exclude spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if trim:
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def sentence_piece(prefix, special=("<unk>", "<s>", "</s>"), vocab_size=420):
    """Trains BPE as in Llama 2, Mistral and Gemma: spaces are ▁, and unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token=special[0], fuse_unk=True))
    if prefix == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    elif prefix == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    strip = [decoders.Strip(" ", 1, 0)] if prefix != "none" else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*special, *byte_tokens], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    description = json.loads(made.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] not in byte_tokens]
    return Tokenizer.from_str(json.dumps(description))


def of_library(made, name="small", config=None, **files):
    """Builds our tokenizer from a library tokenizer and the contents of its accompanying files."""
    config = {"eos_token": "<|eos|>"} if config is None else config
    texts = {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(config)}
    return HuggingFaceTokenizer(texts | {f"{key}.json": json.dumps(value) for key, value in files.items()}, name)


@functools.cache
def kinds():
    """Returns our tokenizers by the name of their kind."""
    framed = {f"{name}_token": f"<|{name}|>" for name in ("pad", "bos", "sep", "eos")}
    piece = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        "byte-level": of_library(byte_level(), config=framed),
        "byte-level, offsets trimmed": of_library(byte_level(trim=True), config=framed),
        "metaspace": of_library(sentence_piece("metaspace"), config=piece),
        "normalizer": of_library(sentence_piece("normalizer"), config=piece),
        "no prefix": of_library(sentence_piece("none"), config=piece),
    }


KINDS = ("byte-level", "byte-level, offsets trimmed", "metaspace", "normalizer", "no prefix")

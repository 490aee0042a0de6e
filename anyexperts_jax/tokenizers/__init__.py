"""Tokenizers (bytes, Hugging Face `tokenizer.json`, GGUF files) and chat templates.

`store.open_tokenizer("bytes" | path)` opens a tokenizer; `base.Tokenizer` is the protocol.
"""

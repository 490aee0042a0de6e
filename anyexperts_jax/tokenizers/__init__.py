"""Text to token ids and back: bytes, Hugging Face `tokenizer.json` and GGUF files, and chat templates.

`store.open_tokenizer("bytes" | path)` opens one; `base.Tokenizer` says what one does.
"""

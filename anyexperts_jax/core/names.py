"""Escapes names chosen by users for places that give some characters a meaning, such as paths."""

import re


def file_name(name: str) -> str:
    """Turns a name into part of a file name. Letters and digits of any script stay; what paths and shells interpret
    becomes %XX.

    file_name("[/red]") is "%5B%2Fred%5D". Different names give different results.
    """
    return re.sub(r"[^\w .+,=@~-]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), name)


def lora_names(weight: str) -> tuple[str, str]:
    """The names of the two factors of a weight's low-rank adapter, which are stored beside the weight."""
    return f"{weight}_lora_a", f"{weight}_lora_b"

"""Names that users choose, where something else would read them as its own marks."""

import re


def file_name(name: str) -> str:
    """A part of a file's name: letters and digits of any script stay, what paths and shells read goes to %XX.

    file_name("[/red]") is "%5B%2Fred%5D". Different names give different parts.
    """
    return re.sub(r"[^\w .+,=@~-]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), name)

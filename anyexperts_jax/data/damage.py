"""The exceptions that decoders raise on damaged files, and their text in one line."""

import struct
import zlib

from anyexperts_jax.core.errors import one_line

# Pillow's and SciPy's readers check little before they unpack, so they raise many kinds of exception.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    NameError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
MEDIA_EXTRA = "the extra `media`: pip install 'anyexperts-jax[media]'"


def said(error: BaseException) -> str:
    """Returns the error's text in one short line, or its class name if it has none."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its text is only the address of a buffer
        return "Pillow knows no such format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(text, 200) or type(error).__name__

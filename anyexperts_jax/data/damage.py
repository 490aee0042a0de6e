"""What decoders raise on damaged files, and what they say about it, in one line."""

import struct
import zlib

from anyexperts_jax.core.errors import one_line

# Of Pillow's and SciPy's readers, which check little before they unpack.
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
MEDIA_EXTRA = "the extra `media`: pip install 'anyexperts-jax[media]'"  # what needs it, and how to get it


def said(error: BaseException) -> str:
    """The error's text in one short line, or its name where it has none."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # whose text is the address of a buffer
        return "Pillow knows no such format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(text, 200) or type(error).__name__

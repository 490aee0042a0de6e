"""Rounding of sizes."""


def round_up(value: int, multiple: int) -> int:
    """Rounds up to a multiple, for example of a length for which a program is compiled."""
    return -(-value // multiple) * multiple

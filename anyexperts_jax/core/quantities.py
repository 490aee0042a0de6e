"""Counts and sizes as text, each in a unit that fits it: a tiny model has "22,120 parameters", not "0.0M"."""


def count_text(count: float) -> str:
    """A count: every digit below 100,000, else millions, billions or trillions.

    >>> [count_text(count) for count in (22_120, 587_000, 134_515_008, 30_532_122_624)]
    ['22,120', '0.6M', '135M', '30.5B']
    """
    if count < 100_000:
        return f"{count:,.0f}"
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
    unit, letter = next((pair for pair in units if count >= 0.9995 * pair[0]), units[-1])
    decimals = 0 if letter == "M" and count >= 9.95e6 else 1
    return f"{count / unit:,.{decimals}f}{letter}"


def bytes_text(size: float, decimals: int = 1) -> str:
    """A number of bytes, in the largest unit of which there is at least a half.

    >>> [bytes_text(size) for size in (500, 1536, 600 * 2**10, 60 * 2**30)]
    ['500 bytes', '1.5 KiB', '0.6 MiB', '60.0 GiB']
    """
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    shown = (f"{size / unit:,.{decimals}f} {name}" for unit, name in units if abs(size) >= unit / 2)
    return next(shown, f"{size:.0f} bytes")


def flops_text(flops: float) -> str:
    """A number of floating point operations, in the largest unit of which there is at least one.

    >>> [flops_text(flops) for flops in (12, 3.4e6, 1.2e15)]
    ['12 FLOP', '3.4 MFLOP', '1,200.0 TFLOP']
    """
    units = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
    shown = (f"{flops / unit:,.1f} {name}" for unit, name in units if flops >= unit)
    return next(shown, f"{flops:,.0f} FLOP")

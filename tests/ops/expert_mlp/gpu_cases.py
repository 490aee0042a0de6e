"""Counts and tolerances for the GPU kernels; operands and expected results come from `cases`."""

import jax.numpy as jnp
import numpy as np


def counts_cases(block: int, capacity: int) -> dict[str, tuple[int, ...]]:
    """Live rows of six experts whose buffers hold `capacity` rows, for kernels with tiles of `block` rows."""
    return {
        "around a block": (0, 1, block - 1, block, block + 1, capacity),
        "one hot expert": (0, 0, 0, capacity, 0, 0),
        "no rows at all": (0, 0, 0, 0, 0, 0),
        "first and last empty": (0, 3, block + 4, block + 1, capacity - 1, 0),
        "every other empty": (5, 0, block, 0, capacity, 0),
        "all full": (capacity,) * 6,
    }


# Error of each expert's slice over its norm. float32 rounds sums of up to 33 products; bfloat16 rounds gate, up,
# hidden, their gradients and the result once each, 2**-9 a time.
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(jnp.bfloat16): 1e-2}


def check(actual, wanted, dtype, tolerance=None) -> None:
    """Every expert's part of every array within the tolerance (of `dtype`, if not given); exactly zero where it must
    be zero."""
    tolerance = TOLERANCE[np.dtype(dtype)] if tolerance is None else tolerance
    names = ("y", "gradient of x", "gradient of w_gate", "gradient of w_up", "gradient of w_down")
    for name, a_array, b_array in zip(names, actual, wanted, strict=True):
        assert a_array.dtype == dtype, name
        for e, (a, b) in enumerate(zip(np.asarray(a_array, np.float64), b_array, strict=True)):
            assert not np.any(a[b == 0]), f"{name}, expert {e}: not zero where it must be"
            error = np.linalg.norm(a - b)
            assert error <= tolerance * np.linalg.norm(b), f"{name}, expert {e}: {error}"

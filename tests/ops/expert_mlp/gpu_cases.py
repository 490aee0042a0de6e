"""Cases for the GPU kernels and what they must give, in float64."""

from typing import NamedTuple

import jax
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


class Operands(NamedTuple):
    x_ECD: jax.Array
    counts_E: jax.Array
    w_gate_EDF: jax.Array
    w_up_EDF: jax.Array
    w_down_EFD: jax.Array
    d_y_ECD: jax.Array


def make_operands(counts, dtype, *, capacity, width, hidden) -> Operands:
    """Operands whose dead rows hold NaN, in x and in the cotangent."""
    rng = np.random.default_rng(0)
    experts = len(counts)
    shapes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    weights = (jnp.asarray(rng.normal(size=shape) * shape[1] ** -0.5, dtype) for shape in shapes)
    dead = (np.arange(capacity) >= np.asarray(counts)[:, None])[..., None]
    x, d_y = (np.where(dead, np.nan, rng.normal(size=(experts, capacity, width))) for _ in range(2))
    return Operands(jnp.asarray(x, dtype), jnp.asarray(counts, jnp.int32), *weights, jnp.asarray(d_y, dtype))


def run(implementation, operands: Operands) -> tuple[jax.Array, ...]:
    """(y, gradient of x, of w_gate, of w_up, of w_down) for the operands' cotangent."""
    x, counts, *weights, d_y = operands
    y, pull = jax.vjp(lambda x, *weights: implementation(x, counts, *weights), x, *weights)
    return y, *pull(d_y)


def expected(operands: Operands) -> tuple[np.ndarray, ...]:
    """The same in NumPy, expert by expert, in float64."""
    x_ECD, _, w_gate_EDF, w_up_EDF, w_down_EFD, d_y_ECD = (np.asarray(a, np.float64) for a in operands)
    results = [np.zeros(a.shape) for a in (x_ECD, x_ECD, w_gate_EDF, w_up_EDF, w_down_EFD)]
    y_ECD, d_x_ECD, d_w_gate_EDF, d_w_up_EDF, d_w_down_EFD = results
    for e, count in enumerate(np.asarray(operands.counts_E)):
        x, d_y = x_ECD[e, :count], d_y_ECD[e, :count]
        gate, up = x @ w_gate_EDF[e], x @ w_up_EDF[e]
        sigmoid = 1 / (1 + np.exp(-gate))
        d_hidden = d_y @ w_down_EFD[e].T
        d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_up = d_hidden * gate * sigmoid
        y_ECD[e, :count] = (gate * sigmoid * up) @ w_down_EFD[e]
        d_x_ECD[e, :count] = d_gate @ w_gate_EDF[e].T + d_up @ w_up_EDF[e].T
        d_w_gate_EDF[e], d_w_up_EDF[e] = x.T @ d_gate, x.T @ d_up
        d_w_down_EFD[e] = (gate * sigmoid * up).T @ d_y
    return tuple(results)


def check(actual, wanted, dtype) -> None:
    """Every expert's part of every array within the tolerance of `dtype`; exactly zero where it must be zero."""
    names = ("y", "gradient of x", "gradient of w_gate", "gradient of w_up", "gradient of w_down")
    for name, a_array, b_array in zip(names, actual, wanted, strict=True):
        assert a_array.dtype == dtype, name
        for e, (a, b) in enumerate(zip(np.asarray(a_array, np.float64), b_array, strict=True)):
            assert not np.any(a[b == 0]), f"{name}, expert {e}: not zero where it must be"
            error = np.linalg.norm(a - b)
            assert error <= TOLERANCE[np.dtype(dtype)] * np.linalg.norm(b), f"{name}, expert {e}: {error}"

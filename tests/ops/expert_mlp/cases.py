"""Shared cases of `expert_mlp`: live rows, operands whose dead rows hold NaN, and what must come out, in float64."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK, CAPACITY = 32, 40  # rows of the tiles that the kernels' tests use, and of a buffer

COUNTS = {
    "around a block": (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CAPACITY),
    "one hot expert": (0, 0, 0, CAPACITY, 0, 0),
    "no rows at all": (0, 0, 0, 0, 0, 0),
    "first and last empty": (0, 3, 20, 0, 33, 0),
    "all full": (CAPACITY,) * 6,
}

# Largest error of an expert's slice over the largest value of the array. bfloat16 rounds gate, up, hidden, their
# gradients and the result once each, 2**-9 a time; float32 only sums in another order.
TOLERANCE = {np.dtype(np.float32): 3e-6, np.dtype(jnp.bfloat16): 2e-2}


class Operands(NamedTuple):
    x_ECD: jax.Array
    counts_E: jax.Array
    w_gate_EDF: jax.Array
    w_up_EDF: jax.Array
    w_down_EFD: jax.Array
    d_y_ECD: jax.Array


class Results(NamedTuple):
    y_ECD: jax.Array
    d_x_ECD: jax.Array
    d_w_gate_EDF: jax.Array
    d_w_up_EDF: jax.Array
    d_w_down_EFD: jax.Array


def make_operands(counts, dtype=np.float32, *, capacity=CAPACITY, width=128, hidden=128) -> Operands:
    rng = np.random.default_rng(sum(counts))
    E = len(counts)
    shapes = ((E, width, hidden), (E, width, hidden), (E, hidden, width))
    weights = (jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[1]), dtype) for shape in shapes)
    dead = (np.arange(capacity) >= np.asarray(counts)[:, None])[..., None]
    x, d_y = (jnp.asarray(np.where(dead, np.nan, rng.normal(size=(E, capacity, width))), dtype) for _ in range(2))
    return Operands(x, jnp.asarray(counts, jnp.int32), *weights, d_y)


def run(expert_mlp: Callable[..., jax.Array], operands: Operands) -> Results:
    x, counts, *weights, d_y = operands
    y, pull = jax.vjp(lambda x, *weights: expert_mlp(x, counts, *weights), x, *weights)
    return Results(y, *pull(d_y))


def expected(operands: Operands) -> Results:
    """Expert by expert, over live rows only."""
    x, _, *weights, d_y = (np.asarray(a, np.float64) for a in operands)
    results = Results(*(np.zeros(a.shape) for a in (x, x, *weights)))
    for e, count in enumerate(np.asarray(operands.counts_E)):
        rows, (w_gate, w_up, w_down) = slice(min(count, x.shape[1])), (w[e] for w in weights)
        x_own, d_own = x[e, rows], d_y[e, rows]
        gate, up = x_own @ w_gate, x_own @ w_up
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden, d_hidden = gate * sigmoid * up, d_own @ w_down.T
        d_gate, d_up = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid)), d_hidden * gate * sigmoid
        values = (
            hidden @ w_down,
            d_gate @ w_gate.T + d_up @ w_up.T,
            x_own.T @ d_gate,
            x_own.T @ d_up,
            hidden.T @ d_own,
        )
        for whole, part in zip(results, values, strict=True):
            whole[e, : part.shape[0]] = part
    return results


def check(results: Results, operands: Operands) -> None:
    """Raises AssertionError unless all five are right, and exactly zero in dead rows and for empty experts."""
    counts = np.asarray(operands.counts_E)
    for name, got, want in zip(Results._fields, results, expected(operands), strict=True):
        assert got.dtype == operands.x_ECD.dtype, name
        got = np.asarray(got, np.float64)
        assert got.shape == want.shape, name
        assert np.all(np.isfinite(got)), f"{name} holds what was never written"
        for e, count in enumerate(counts):
            dead = got[e, count:] if name.endswith("ECD") else got[e, : 0 if count else None]
            assert not np.any(dead), f"{name} of expert {e} is not zero where it must be"
        scale = max(np.abs(want).max(), 1e-30)
        error = np.abs(got - want).max() / scale
        assert error <= TOLERANCE[np.dtype(operands.x_ECD.dtype)], f"{name} is off by {error:.2e}"

"""The bodies of the TPU kernels in `pallas_tpu`: what a kernel computes on one tile, slab by slab.

A function named `*_kernel` is the body of one kernel. The others compute one of its results for one slab of rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from anyexperts_jax.ops.expert_mlp.tpu_grid import Ref, Slab, Step, for_each_slab, zero_dead
from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes

Refs = Sequence[Ref]
LANES = 128
_CHUNK = 256  # columns of a result at a time: bounds the float32 values in flight between a matmul and its store
_TRANSPOSED_RIGHT = (((1,), (1,)), ((), ()))
_TRANSPOSED_LEFT = (((0,), (0,)), ((), ()))
_PLAIN = (((1,), (0,)), ((), ()))


def _dot(a: Any, b: Any, dimensions: Any = _PLAIN) -> Any:
    # By default the matrix unit rounds float32 operands to bfloat16.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _chunks(width: int, size: int = _CHUNK) -> Iterator[slice]:
    return (slice(start, min(start + size, width)) for start in range(0, width, size))


def _gate_up(x: Any, w_gate_ref: Ref, w_up_ref: Ref, columns: slice) -> tuple[Any, Any]:
    """x w_gate and x w_up as one matmul, whose right operand alternates 128 columns of each. That fills a 256-wide
    matrix unit even if F is an odd multiple of 128."""
    lanes = [slice(s, s + LANES) for s in range(columns.start, columns.stop, LANES)]
    both = _dot(x, jnp.concatenate([ref[:, lane] for lane in lanes for ref in (w_gate_ref, w_up_ref)], axis=1))
    parts = _lanes(both)
    return jnp.concatenate(parts[::2], axis=1), jnp.concatenate(parts[1::2], axis=1)


def _hidden(slab: Slab, x_ref: Ref, weights: Refs, hidden_ref: Ref, kept: Refs) -> None:
    """hidden = silu(gate) * up with gate = x w_gate and up = x w_up; gate and up are stored in `kept`, if given."""
    x = x_ref[slab.rows, :]
    for columns in _chunks(hidden_ref.shape[1]):
        gate, up = _gate_up(x, weights[0], weights[1], columns)
        hidden_ref[slab.rows, columns] = (gate * jax.nn.sigmoid(gate) * up).astype(hidden_ref.dtype)
        if kept:
            kept[0][slab.rows, columns] = gate.astype(kept[0].dtype)
            kept[1][slab.rows, columns] = up.astype(kept[1].dtype)


def _down(slab: Slab, hidden_ref: Ref, w_down_ref: Ref, y_ref: Ref, inner: int | None) -> None:
    """y = hidden w_down, contracting `inner` columns of hidden at a time."""
    parts = list(_chunks(hidden_ref.shape[1], inner or hidden_ref.shape[1]))
    hidden = [hidden_ref[slab.rows, part] for part in parts]
    for columns in _chunks(y_ref.shape[1], 2 * _CHUNK):
        y = _dot(hidden[0], w_down_ref[parts[0], columns])
        for value, part in zip(hidden[1:], parts[1:], strict=True):
            y += _dot(value, w_down_ref[part, columns])
        y_ref[slab.rows, columns] = slab.mask(y).astype(y_ref.dtype)


def _hidden_backward(slab: Slab, d_y_ref: Ref, given: Refs, weights: Refs, outputs: Refs, slots: Refs = ()) -> None:
    """Gradients of gate and up, and hidden recomputed. `given` is x, or the saved gate and up.

    `slots` holds references to the rows' combine weights and to their gradients. If given, all three results are
    multiplied by the row's weight, and the weight's gradient is stored as 128 partial sums, each over every 128th
    column: adding whole vector registers needs no reduction across lanes.
    """
    d_y = d_y_ref[slab.rows, :]
    sums = jnp.zeros((slab.size, LANES), jnp.float32)
    for columns in _chunks(outputs[0].shape[1]):
        if len(given) == 1:
            gate, up = _gate_up(given[0][slab.rows, :], weights[0], weights[1], columns)
        else:
            gate, up = (ref[slab.rows, columns].astype(jnp.float32) for ref in given)
        d_hidden = _dot(d_y, weights[-1][columns, :], _TRANSPOSED_RIGHT)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        if slots:
            # d_y is the gradient of the token here, not yet weighted, so this sum is the weight's own gradient.
            sums += sum(_lanes(d_hidden * hidden))
            weight = jnp.concatenate([slots[0][slab.rows, :]] * (hidden.shape[1] // LANES), axis=1)
            d_hidden, hidden = d_hidden * weight, hidden * weight
        results = d_hidden * up * (sigmoid + silu * (1 - sigmoid)), d_hidden * silu, hidden
        for ref, value in zip(outputs, results, strict=True):
            ref[slab.rows, columns] = value.astype(ref.dtype)
    if slots:
        slots[1][slab.rows, :] = sums


def _lanes(value: Any) -> list[Any]:
    return [value[:, s : s + LANES] for s in range(0, value.shape[1], LANES)]


def _rows_backward(slab: Slab, d_gate_ref: Ref, d_up_ref: Ref, weights: Refs, d_x_ref: Ref) -> None:
    """d_x = d_gate w_gate^T + d_up w_up^T."""
    d_gate, d_up = d_gate_ref[slab.rows, :], d_up_ref[slab.rows, :]
    for columns in _chunks(d_x_ref.shape[1], 2 * _CHUNK):
        d_x = _dot(d_gate, weights[0][columns, :], _TRANSPOSED_RIGHT)
        d_x += _dot(d_up, weights[1][columns, :], _TRANSPOSED_RIGHT)
        d_x_ref[slab.rows, columns] = slab.mask(d_x).astype(d_x_ref.dtype)


def _weights_backward(slab: Slab, fresh: Any, inputs: Refs, totals: Refs) -> None:
    """Adds x^T d_gate, x^T d_up and hidden^T d_y to `totals`, which restart from zero if `fresh` (None: always)."""
    x_ref, d_y_ref, d_gate_ref, d_up_ref, hidden_ref = inputs
    pairs = ((x_ref, d_gate_ref), (x_ref, d_up_ref), (hidden_ref, d_y_ref))
    # Dead rows are masked on both sides: they may hold NaN or infinity, which zeros on one side would turn into NaN.
    for (left_ref, right_ref), total_ref in zip(pairs, totals, strict=True):
        right = slab.mask(right_ref[slab.rows, :])
        for columns in _chunks(left_ref.shape[1]):
            total = _dot(slab.mask(left_ref[slab.rows, columns]), right, _TRANSPOSED_LEFT)
            if fresh is not None:  # a select, because scratch memory holds anything before its first use
                total += jnp.where(fresh, 0.0, total_ref[columns, :])
            total_ref[columns, :] = total.astype(total_ref.dtype)


def forward_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    (x_ref, *w_hidden, w_down_ref), (y_ref, *kept), (hidden_ref,) = inputs, outputs, scratch

    def run(slab: Slab) -> None:
        _hidden(slab, x_ref, w_hidden, hidden_ref, kept)
        _down(slab, hidden_ref, w_down_ref, y_ref, sizes.inner)

    for_each_slab(step.live, sizes, run)
    zero_dead(y_ref, step.live, sizes)


def hidden_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    (x_ref, *weights), (hidden_ref, *kept) = inputs, outputs
    for_each_slab(step.live, sizes, lambda slab: _hidden(slab, x_ref, weights, hidden_ref, kept))


def down_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    (hidden_ref, w_down_ref), (y_ref,) = inputs, outputs
    for_each_slab(step.live, sizes, lambda slab: _down(slab, hidden_ref, w_down_ref, y_ref, sizes.inner))
    zero_dead(y_ref, step.live, sizes)


def backward_kernel(
    step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes, weighted: bool
) -> None:
    d_y_ref, *given, w_gate_ref, w_up_ref, w_down_ref = inputs
    d_x_ref, *d_hidden = outputs
    slots = (given.pop(), d_hidden.pop()) if weighted else ()

    def run(slab: Slab) -> None:
        _hidden_backward(slab, d_y_ref, given, (w_gate_ref, w_up_ref, w_down_ref), d_hidden, slots)
        _rows_backward(slab, d_hidden[0], d_hidden[1], (w_gate_ref, w_up_ref), d_x_ref)

    for_each_slab(step.live, sizes, run)
    zero_dead(d_x_ref, step.live, sizes)


def hidden_backward_kernel(
    step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes, num_given: int
) -> None:
    d_y_ref, given, weights = inputs[0], inputs[1 : 1 + num_given], inputs[1 + num_given :]
    for_each_slab(step.live, sizes, lambda slab: _hidden_backward(slab, d_y_ref, given, weights, outputs))


def rows_backward_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    d_gate_ref, d_up_ref, *weights = inputs
    for_each_slab(step.live, sizes, lambda slab: _rows_backward(slab, d_gate_ref, d_up_ref, weights, outputs[0]))
    zero_dead(outputs[0], step.live, sizes)


def weights_kernel(step: Step, inputs: Refs, outputs: Refs, scratch: Refs, *, sizes: KernelSizes) -> None:
    # An expert without rows has one step with nothing to sum; its gradient must still be written.
    @pl.when(step.live == 0)
    def _() -> None:
        for ref in outputs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def run(slab: Slab) -> None:
        fresh = (step.opens == 1) & (slab.start == 0) if scratch else None
        _weights_backward(slab, fresh, inputs, scratch or outputs)

    for_each_slab(step.live, sizes, run)
    if scratch:

        @pl.when((step.live > 0) & (step.closes == 1))
        def _() -> None:
            for total_ref, ref in zip(scratch, outputs, strict=True):
                ref[...] = total_ref[...].astype(ref.dtype)

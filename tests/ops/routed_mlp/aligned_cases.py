"""The shared cases of `expert_mlp` in a block-aligned buffer, with NaN in every dead row, and the way back to [E, C,
D]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.ops.aligned_rows import aligned_starts, num_aligned_rows
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.routed_mlp.buffered import AlignedKernels
from tests.ops.expert_mlp.cases import Operands, Results


class Buffer(NamedTuple):
    x_RD: jax.Array
    starts_E: jax.Array
    counts_E: jax.Array
    experts: ExpertWeights
    d_y_RD: jax.Array


# Faults in the operands of kernels, which the kernels' tests must find.
FAULTS = {
    "gate and up swapped": lambda b: b._replace(experts=ExpertWeights(b.experts[1], b.experts[0], b.experts[2])),
    "experts swapped": lambda b: b._replace(experts=ExpertWeights(*(w[::-1] for w in b.experts))),
    "counts too high": lambda b: b._replace(counts_E=b.counts_E + 1),
    "counts too low": lambda b: b._replace(counts_E=jnp.maximum(b.counts_E - 1, 0)),
    "starts reversed": lambda b: b._replace(starts_E=b.starts_E[::-1]),
}


def to_buffer(operands: Operands, block: int) -> Buffer:
    x, counts, *experts, d_y = operands
    starts = np.asarray(aligned_starts(counts, block))
    rows = num_aligned_rows(len(counts) * x.shape[1], len(counts), block)  # for any counts: one program for all

    def flat(a):
        whole = np.full((rows, a.shape[2]), np.nan)
        for e, (start, count) in enumerate(zip(starts, np.asarray(counts), strict=True)):
            whole[start : start + count] = np.asarray(a, np.float64)[e, :count]
        return jnp.asarray(whole, a.dtype)

    return Buffer(flat(x), jnp.asarray(starts), counts, ExpertWeights(*experts), flat(d_y))


def run_kernels(kernels: AlignedKernels, buffer: Buffer, *, keep: bool = True, take: bool = False) -> Results:
    """y and d_x as rows [R, D]; without `keep` the backward pass gets only the operands.

    With `take`, x holds the rows in another order and `kernels.take` restores it.
    """
    x, starts, counts, experts, d_y = buffer
    if take:
        tokens_R = jnp.asarray(np.random.default_rng(0).permutation(x.shape[0]), jnp.int32)
        x, d_y = (kernels.take(a[jnp.argsort(tokens_R)], tokens_R) for a in (x, d_y))
    y, kept = kernels.forward(x, starts, counts, experts, keep=keep)
    d_x, d_hidden = kernels.rows_backward(x, starts, counts, kept, experts, d_y)
    return Results(y, d_x, *kernels.weights_backward(x, starts, counts, d_hidden, d_y))


def to_experts(results: Results, buffer: Buffer, capacity: int) -> Results:
    """y and d_x as [E, C, D], zero after an expert's rows."""

    def unflat(a):
        whole = np.zeros((len(buffer.counts_E), capacity, a.shape[1]), np.float64)
        for e, (start, count) in enumerate(zip(buffer.starts_E.tolist(), buffer.counts_E.tolist(), strict=True)):
            whole[e, :count] = np.asarray(a, np.float64)[start : start + count]
        return jnp.asarray(whole, a.dtype)

    return results._replace(y_ECD=unflat(results.y_ECD), d_x_ECD=unflat(results.d_x_ECD))

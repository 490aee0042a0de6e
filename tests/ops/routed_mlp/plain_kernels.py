"""`AlignedKernels` in a few lines: each row multiplied by its own copy of its expert's weights."""

import jax
import jax.numpy as jnp

from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp
from anyexperts_jax.ops.routed_mlp.buffered import AlignedKernels


def live_rows(num_rows, starts_E, counts_E):
    """[R, E], True where the row is the expert's."""
    row_R1 = jnp.arange(num_rows)[:, None]
    return (row_R1 >= starts_E[None]) & (row_R1 < (starts_E + counts_E)[None])


def own(experts, num_rows, starts_E, counts_E):
    expert_R = jnp.argmax(live_rows(num_rows, starts_E, counts_E), axis=1)
    return (w[expert_R].astype(jnp.float32) for w in experts)


def dot(spec, a, b):
    return jnp.einsum(spec, a.astype(jnp.float32), b)


def forward(x_RD, starts_E, counts_E, experts, *, keep):
    w_gate, w_up, w_down = own(experts, x_RD.shape[0], starts_E, counts_E)
    gate, up = dot("rd,rdf->rf", x_RD, w_gate), dot("rd,rdf->rf", x_RD, w_up)
    y_RD = dot("rf,rfd->rd", swiglu(gate, up, x_RD.dtype), w_down).astype(x_RD.dtype)
    return y_RD, (gate.astype(x_RD.dtype), up.astype(x_RD.dtype)) if keep else ()


def rows_backward(x_RD, starts_E, counts_E, kept, experts, d_y_RD):
    w_gate, w_up, w_down = own(experts, x_RD.shape[0], starts_E, counts_E)
    hidden, d_gate, d_up = swiglu_vjp(*kept, dot("rd,rfd->rf", d_y_RD, w_down))
    d_x_RD = dot("rf,rdf->rd", d_gate, w_gate) + dot("rf,rdf->rd", d_up, w_up)
    return jax.tree.map(lambda a: a.astype(x_RD.dtype), (d_x_RD, (d_gate, d_up, hidden)))


def weights_backward(x_RD, starts_E, counts_E, d_hidden, d_y_RD):
    dtype, live_RE = x_RD.dtype, live_rows(x_RD.shape[0], starts_E, counts_E)
    x_RD, d_gate, d_up, hidden, d_y_RD = (
        jnp.where(live_RE.any(1, keepdims=True), a, 0).astype(jnp.float32) for a in (x_RD, *d_hidden, d_y_RD)
    )
    pairs = ((x_RD, d_gate), (x_RD, d_up), (hidden, d_y_RD))
    own_RE = live_RE.astype(jnp.float32)
    return tuple(jnp.einsum("re,ri,rj->eij", own_RE, a, b).astype(dtype) for a, b in pairs)


PLAIN = AlignedKernels(forward, rows_backward, weights_backward)

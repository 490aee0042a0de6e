"""Attention of one example, forward and backward, heads first.

[G, J, T, A] queries go over [G, S, A] keys and [G, S, W] values; J query heads share a key head. The forward pass
saves two numbers per row, the softmax's maximum and its sum; the backward pass recomputes the scores from them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from anyexperts_jax.ops._dots import dot

MASKED = -1e30  # finite, so that a row without any visible position becomes uniform instead of NaN


class Softmax(NamedTuple):
    """The two numbers that turn a row's scores into weights: exp(score - peak) / total."""

    peak_GJT1: Float[Array, "G J T 1"]
    total_GJT1: Float[Array, "G J T 1"]


def forward(
    queries_GJTA: Float[Array, "G J T A"],
    keys_GSA: Float[Array, "G S A"],
    values_GSW: Float[Array, "G S W"],
    mask_TS: Bool[Array, "T S"],
) -> tuple[Float[Array, "G J T W"], Softmax]:
    """(the weighted mean of the values in float32, the softmax for `backward`)."""
    scores_GJTS = _scores(queries_GJTA, keys_GSA, mask_TS)
    peak_GJT1 = scores_GJTS.max(axis=-1, keepdims=True)
    weights_GJTS = jnp.exp(scores_GJTS - peak_GJT1)
    total_GJT1 = weights_GJTS.sum(axis=-1, keepdims=True)
    # Dividing the result takes T * W divisions; dividing the weights would take T * S.
    mean_GJTW = dot("gjts,gsw->gjtw", weights_GJTS.astype(values_GSW.dtype), values_GSW) / total_GJT1
    return mean_GJTW, Softmax(peak_GJT1, total_GJT1)


def backward(
    queries_GJTA: Float[Array, "G J T A"],
    keys_GSA: Float[Array, "G S A"],
    values_GSW: Float[Array, "G S W"],
    mask_TS: Bool[Array, "T S"],
    mean_GJTW: Float[Array, "G J T W"],
    softmax: Softmax,
    d_mean_GJTW: Float[Array, "G J T W"],
) -> tuple[Float[Array, "G J T A"], Float[Array, "G S A"], Float[Array, "G S W"]]:
    """Gradients of queries, keys and values, in float32."""
    dtype, scale = queries_GJTA.dtype, queries_GJTA.shape[-1] ** -0.5
    scores_GJTS = _scores(queries_GJTA, keys_GSA, mask_TS)
    weights_GJTS = jnp.exp(scores_GJTS - softmax.peak_GJT1) / softmax.total_GJT1
    d_values_GSW = dot("gjts,gjtw->gsw", weights_GJTS.astype(dtype), d_mean_GJTW)
    d_weights_GJTS = dot("gjtw,gsw->gjts", d_mean_GJTW, values_GSW)
    wide = d_weights_GJTS.dtype
    # The softmax's gradient needs sum_s(weight * d_weight) of each row, which equals mean . d_mean: W terms, not S.
    shift_GJT1 = (mean_GJTW.astype(wide) * d_mean_GJTW.astype(wide)).sum(axis=-1, keepdims=True)
    d_scores_GJTS = scale * weights_GJTS * (d_weights_GJTS - shift_GJT1)
    d_scores_GJTS = jnp.where(mask_TS[None, None], d_scores_GJTS, 0).astype(dtype)
    d_queries_GJTA = dot("gjts,gsa->gjta", d_scores_GJTS, keys_GSA)
    d_keys_GSA = dot("gjts,gjta->gsa", d_scores_GJTS, queries_GJTA)
    return d_queries_GJTA, d_keys_GSA, d_values_GSW


def _scores(queries_GJTA: Array, keys_GSA: Array, mask_TS: Array) -> Float[Array, "G J T S"]:
    scores_GJTS = dot("gjta,gsa->gjts", queries_GJTA, keys_GSA) * queries_GJTA.shape[-1] ** -0.5
    return jnp.where(mask_TS[None, None], scores_GJTS, MASKED)

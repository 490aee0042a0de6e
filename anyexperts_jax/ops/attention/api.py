"""`attention`: softmax attention under any mask, by the implementation that suits the platform."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._dots import dot
from anyexperts_jax.ops._select import platform, select_implementation
from anyexperts_jax.ops.attention import cudnn, splash, vjp
from anyexperts_jax.ops.attention.by_example import MASKED
from anyexperts_jax.ops.attention.mask import CausalMask

_FEW_QUERIES = 16  # with fewer, as in decoding, one batched dot is as fast as a loop over examples


def _xla(queries_BTHA: Array, keys_BSGA: Array, values_BSGW: Array, mask_BTS: Array) -> Float[Array, "B T H W"]:
    """Two dots and a softmax, summed in float32 or wider. Scores are kept for the backward pass.

    `jax.nn.dot_product_attention` cannot be used: its dots name an algorithm, and their backward pass cannot be lowered
    in 16 bits under strict dtype promotion (JAX 0.12).
    """
    batch, length, heads, width = queries_BTHA.shape
    groups = keys_BSGA.shape[2]
    queries_BTGJA = queries_BTHA.reshape(batch, length, groups, heads // groups, width)
    scores_BGJTS = dot("btgja,bsga->bgjts", queries_BTGJA, keys_BSGA) * width**-0.5
    weights_BGJTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BGJTS, MASKED), axis=-1)
    out_BTGJW = dot("bgjts,bsgw->btgjw", weights_BGJTS.astype(values_BSGW.dtype), values_BSGW)
    return out_BTGJW.reshape(batch, length, heads, -1).astype(queries_BTHA.dtype)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"xla": _xla, "by_example": vjp.attention_by_example}
# They take a CausalMask only, values as wide as keys, and arrays of a single device.
KERNELS: dict[str, Callable[..., Array]] = {
    "splash": splash.splash_attention,
    "cudnn": cudnn.cudnn_attention,
}


def default_implementation(queries: int, width: int, dtype: jnp.dtype, causal: bool) -> str:
    """The platform's kernel if it supports mask, sizes and dtype; "by_example" on a single CPU device; else "xla"."""
    if causal and platform() == "tpu" and splash.supports(queries, width):
        return "splash"
    if causal and cudnn.is_available() and cudnn.supports(queries, width, dtype):
        return "cudnn"
    # On several devices the batch axis is sharded, and a loop over it would gather every example on every device.
    single_cpu = platform() == "cpu" and jax.device_count() == 1
    return "by_example" if single_cpu and queries >= _FEW_QUERIES else "xla"


def attention(
    queries_BTHA: Float[Array, "B T H A"],
    keys_BSGA: Float[Array, "B S G A"],
    values_BSGW: Float[Array, "B S G W"],
    mask: Bool[Array, "B T S"] | CausalMask,
    implementation: str | None = None,
) -> Float[Array, "B T H W"]:
    """softmax(q k^T / sqrt(A)) v over the positions with `mask[b, t, s]`; H / G query heads share a key head.

    The softmax is computed in float32. A position that attends to nothing gets the mean of all values.

    Args:
      implementation: "xla" is two dots and a softmax. "by_example" loops over the examples, so that the scores
        of one stay in a CPU's cache, and saves no scores for the backward pass. The kernels save none either and take a
        CausalMask only, and values as wide as keys, W = A: "splash" is JAX's own for TPUs, with T and A multiples of
        128; "cudnn" is NVIDIA's, on an attached GPU, in bfloat16 or float16. None chooses a kernel if one can run,
        "by_example" if JAX has a single CPU device and T is at least 16, and "xla" otherwise.

    Raises:
      UserError: if H is not a multiple of G, or for an unknown implementation.
    """
    heads, kv_heads = queries_BTHA.shape[2], keys_BSGA.shape[2]
    require(heads % kv_heads == 0, f"{heads} query heads cannot share {kv_heads} key heads; use a multiple")
    causal = isinstance(mask, CausalMask) and values_BSGW.shape[3] == keys_BSGA.shape[3]
    default = default_implementation(queries_BTHA.shape[1], queries_BTHA.shape[3], queries_BTHA.dtype, causal)
    run = select_implementation(implementation, IMPLEMENTATIONS | KERNELS if causal else IMPLEMENTATIONS, default)
    if isinstance(mask, CausalMask) and run not in KERNELS.values():
        return run(queries_BTHA, keys_BSGA, values_BSGW, mask.dense())
    return run(queries_BTHA, keys_BSGA, values_BSGW, mask)

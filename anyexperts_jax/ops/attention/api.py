"""`attention`: softmax attention under any mask, in the form the platform runs well."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._select import platform, select_implementation
from anyexperts_jax.ops.attention import cudnn, splash, vjp
from anyexperts_jax.ops.attention.mask import CausalMask

_FEW_QUERIES = 16  # with fewer, as in decoding, one batched dot is as fast


def _xla(queries_BTHA: Array, keys_BSGA: Array, values_BSGA: Array, mask_BTS: Array) -> Float[Array, "B T H A"]:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code widens bfloat16 scores by promotion
        return jax.nn.dot_product_attention(queries_BTHA, keys_BSGA, values_BSGA, mask=mask_BTS[:, None])


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"xla": _xla, "by_example": vjp.attention_by_example}
KERNELS: dict[str, Callable[..., Array]] = {  # for a CausalMask alone, and one device's part of the arrays
    "splash": splash.splash_attention,
    "cudnn": cudnn.cudnn_attention,
}


def default_implementation(queries: int, width: int, dtype: jnp.dtype, causal: bool) -> str:
    """The platform's kernel where it takes the mask, the sizes and the dtype. Examples in turn on a lone CPU; among
    several devices the batch is sharded and must not be walked along."""
    if causal and platform() == "tpu" and splash.takes(queries, width):
        return "splash"
    if causal and cudnn.is_there() and cudnn.takes(queries, width, dtype):
        return "cudnn"
    alone = platform() == "cpu" and jax.device_count() == 1
    return "by_example" if alone and queries >= _FEW_QUERIES else "xla"


def attention(
    queries_BTHA: Float[Array, "B T H A"],
    keys_BSGA: Float[Array, "B S G A"],
    values_BSGA: Float[Array, "B S G A"],
    mask: Bool[Array, "B T S"] | CausalMask,
    implementation: str | None = None,
) -> Float[Array, "B T H A"]:
    """softmax(q k^T / sqrt(A)) v over the positions with `mask[b, t, s]`; H / G query heads share a key head.

    The softmax is taken in float32. A position that may see nothing gets the mean of all values.

    Args:
      implementation: "xla" is `jax.nn.dot_product_attention`. "by_example" takes one example after the other, so that
        its scores stay in a CPU's cache, and keeps no scores for the backward pass. The kernels keep none either and
        take a CausalMask alone: "splash" is JAX's own for TPUs, T and A multiples of 128; "cudnn" is NVIDIA's, on a
        GPU that is attached, in bfloat16 or float16. None is a kernel where one runs, "by_example" where JAX has a
        single CPU device and T is at least 16, and "xla" everywhere else.

    Raises:
      UserError: H is no multiple of G, or an unknown implementation.
    """
    heads, kv_heads = queries_BTHA.shape[2], keys_BSGA.shape[2]
    require(heads % kv_heads == 0, f"{heads} query heads cannot share {kv_heads} key heads; use a multiple")
    causal = isinstance(mask, CausalMask)
    default = default_implementation(queries_BTHA.shape[1], queries_BTHA.shape[3], queries_BTHA.dtype, causal)
    run = select_implementation(implementation, IMPLEMENTATIONS | KERNELS if causal else IMPLEMENTATIONS, default)
    if isinstance(mask, CausalMask) and run not in KERNELS.values():
        return run(queries_BTHA, keys_BSGA, values_BSGA, mask.dense())
    return run(queries_BTHA, keys_BSGA, values_BSGA, mask)

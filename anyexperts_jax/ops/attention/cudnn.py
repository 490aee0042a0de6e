"""cuDNN's flash attention through `jax.nn`: for attached NVIDIA GPUs, in 16-bit floats; it saves no scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._select import device_kind, is_nvidia, platform
from anyexperts_jax.ops.attention.mask import CausalMask

_OLDEST = (8, 0)  # the least compute capability, Ampere's
_WIDEST = 128  # the largest head width that all of these GPUs support
_DTYPES = (jnp.bfloat16, jnp.float16)


def is_available() -> bool:
    """Whether the computation runs on an attached GPU that supports it. XLA cannot even compile it without the GPU."""
    if not (platform() == jax.default_backend() == "gpu" and is_nvidia(device_kind())):
        return False
    return tuple(int(part) for part in jax.devices()[0].compute_capability.split(".")) >= _OLDEST


def supports(length: int, width: int, dtype: jnp.dtype) -> bool:
    """Whether cuDNN supports T = `length`, A = `width` and the dtype."""
    return length % 2 == 0 and width % 8 == 0 and width <= _WIDEST and dtype in _DTYPES


def cudnn_attention(
    queries_BTHA: Float[Array, "B T H A"],
    keys_BTGA: Float[Array, "B T G A"],
    values_BTGA: Float[Array, "B T G A"],
    mask: CausalMask,
) -> Float[Array, "B T H A"]:
    """Causal attention by cuDNN. Its gradients are not deterministic in the last bits.

    Raises:
      UserError: without such a GPU, or for lengths, widths and dtypes that cuDNN does not support.
    """
    require(
        is_available(),
        f"implementation='cudnn' needs an NVIDIA GPU of compute capability {'.'.join(map(str, _OLDEST))} or later, not "
        f"{device_kind()!r}; use implementation='xla'",
    )
    _, length, _, width = queries_BTHA.shape
    require(
        supports(length, width, queries_BTHA.dtype) and keys_BTGA.shape[1] == length,
        f"implementation='cudnn' takes bfloat16 or float16, an even number of positions, keys at the same ones, and "
        f"head widths that are multiples of 8 up to {_WIDEST}; there are {length} queries and {keys_BTGA.shape[1]} "
        f"keys of width {width} in {queries_BTHA.dtype}; use implementation='xla'",
    )
    # Validity and segments go in as a dense mask; causality goes in as a flag, so that cuDNN skips the blocks beyond
    # the diagonal.
    mask_B1TT = mask.without_causality()[:, None]
    with jax.numpy_dtype_promotion("standard"):  # JAX widens 16-bit scores by promotion
        return jax.nn.dot_product_attention(
            queries_BTHA, keys_BTGA, values_BTGA, mask=mask_B1TT, is_causal=True, implementation="cudnn"
        )

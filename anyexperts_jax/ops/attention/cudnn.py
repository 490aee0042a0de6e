"""cuDNN's flash attention, through `jax.nn`: for NVIDIA GPUs that are there, in 16 bits, no scores kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._select import device_kind, is_nvidia, platform
from anyexperts_jax.ops.attention.mask import CausalMask

_OLDEST = (8, 0)  # compute capability
_WIDEST = 128  # head width that all of these GPUs take
_DTYPES = (jnp.bfloat16, jnp.float16)


def is_there() -> bool:
    """Whether the computation will run on an attached GPU that has it. Without the GPU XLA cannot even compile it."""
    if not (platform() == jax.default_backend() == "gpu" and is_nvidia(device_kind())):
        return False
    return tuple(int(part) for part in jax.devices()[0].compute_capability.split(".")) >= _OLDEST


def takes(length: int, width: int, dtype: jnp.dtype) -> bool:
    """Whether it runs at T = `length` and A = `width`."""
    return length % 2 == 0 and width % 8 == 0 and width <= _WIDEST and dtype in _DTYPES


def cudnn_attention(
    queries_BTHA: Float[Array, "B T H A"],
    keys_BTGA: Float[Array, "B T G A"],
    values_BTGA: Float[Array, "B T G A"],
    mask: CausalMask,
) -> Float[Array, "B T H A"]:
    """Causal attention by cuDNN. Its gradients may differ in the last bits from one call to the next.

    Raises:
      UserError: no such GPU, or lengths, widths and dtypes that it does not take.
    """
    require(
        is_there(),
        f"implementation='cudnn' needs an NVIDIA GPU of compute capability {'.'.join(map(str, _OLDEST))} or later, not "
        f"{device_kind()!r}; use implementation='xla'",
    )
    _, length, _, width = queries_BTHA.shape
    require(
        takes(length, width, queries_BTHA.dtype) and keys_BTGA.shape[1] == length,
        f"implementation='cudnn' takes bfloat16 or float16, an even number of positions, keys at the same ones, and "
        f"head widths that are multiples of 8 up to {_WIDEST}; there are {length} queries and {keys_BTGA.shape[1]} "
        f"keys of width {width} in {queries_BTHA.dtype}; use implementation='xla'",
    )
    # It takes validity and segments as a bias, for every pair; the pairs past the diagonal it skips.
    mask_B1TT = mask.in_any_order()[:, None]
    with jax.numpy_dtype_promotion("standard"):  # see `api._xla`
        return jax.nn.dot_product_attention(
            queries_BTHA, keys_BTGA, values_BTGA, mask=mask_B1TT, is_causal=True, implementation="cudnn"
        )

"""JAX's own splash attention for TPUs: scores stay in VMEM block by block, and blocks beyond the diagonal are skipped.

Saved for the backward pass are the queries, keys, values, the result and each row's log-sum-exp; no scores.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.ops._select import platform
from anyexperts_jax.ops.attention.mask import CausalMask

LANES = 128  # lanes of a vector register: head widths and blocks of positions must be multiples of it
_BLOCKS = (512, 256, LANES)  # positions per block, of queries and of keys


def supports(length: int, width: int) -> bool:
    """Whether the kernels support T = `length` and A = `width`."""
    return length % LANES == 0 and width % LANES == 0


def splash_attention(
    queries_BTHA: Float[Array, "B T H A"],
    keys_BTGA: Float[Array, "B T G A"],
    values_BTGA: Float[Array, "B T G A"],
    mask: CausalMask,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H A"]:
    """Causal attention by the kernels.

    Args:
      interpret: run them without a TPU, for tests.

    Raises:
      UserError: without a TPU, or for lengths and widths that the kernels do not support.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # Pallas is slow to import: only on use

    found = platform()
    require(
        interpret or found == "tpu", f"implementation='splash' needs a TPU, not {found!r}; use implementation='xla'"
    )
    _, length, heads, width = queries_BTHA.shape
    require(
        supports(length, width) and keys_BTGA.shape[1] == length,
        f"implementation='splash' takes positions and head widths that are multiples of {LANES}, keys at the same "
        f"positions; there are {length} queries, {keys_BTGA.shape[1]} keys of width {width}; use implementation='xla'",
    )
    block = next(size for size in _BLOCKS if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = library.make_splash_mha_single_device(
        mask=library.MultiHeadMask([library.CausalMask((length, length))] * heads),
        block_sizes=library.BlockSizes(**sizes),
        interpret=interpret,
    )

    def run(queries_HTA: Array, keys_GTA: Array, values_GTA: Array, segments_T: Array) -> Array:
        return kernel(queries_HTA, keys_GTA, values_GTA, library.SegmentIds(segments_T, segments_T))

    # The kernel does not scale the scores, so the queries are scaled before it.
    scaled = (queries_BTHA * width**-0.5).astype(queries_BTHA.dtype)
    queries_BHTA, keys_BGTA, values_BGTA = (a.swapaxes(1, 2) for a in (scaled, keys_BTGA, values_BTGA))
    segment_BT = jnp.zeros(mask.valid_BT.shape, jnp.int32) if mask.segment_BT is None else mask.segment_BT
    kernel_segment_BT = jnp.where(mask.valid_BT, segment_BT + 1, 0)  # segment 0 keeps invalid positions to themselves
    return jax.vmap(run)(queries_BHTA, keys_BGTA, values_BGTA, kernel_segment_BT).swapaxes(1, 2)

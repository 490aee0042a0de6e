"""Attention among devices: kernels each device runs on its own sequences and heads, everything else left to XLA."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from anyexperts_jax.ops._select import sees_one_device
from anyexperts_jax.ops.attention import CausalMask, attention
from anyexperts_jax.ops.attention.api import KERNELS, default_implementation
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import parts


def whole_mask(
    mask: CausalMask, width: int, dtype: jnp.dtype, placement: Placement | None
) -> CausalMask | Bool[Array, "B T T"]:
    """`mask` as it is where a kernel takes it, else as the array that all layers then share.

    Args:
      width: of a head.
      dtype: of queries, keys and values.
    """
    runs = default_implementation(mask.valid_BT.shape[1], width, dtype, causal=True) in KERNELS
    if placement is None:
        whole = sees_one_device()
    else:  # a kernel sees the positions that its device has
        whole = parts(placement.mesh, placement.rules.length) == 1
    return mask if runs and whole else mask.dense()


def split_attention(
    queries_BTHA: Float[Array, "B T H A"],
    keys_BSGA: Float[Array, "B S G A"],
    values_BSGA: Float[Array, "B S G A"],
    mask: Bool[Array, "B T S"] | CausalMask,
    placement: Placement | None,
) -> Float[Array, "B T H A"]:
    """`ops.attention`. With a `CausalMask`, which goes to kernels that XLA cannot split, under a `shard_map`."""
    if placement is None or placement.mesh.size == 1 or not isinstance(mask, CausalMask):
        return attention(queries_BTHA, keys_BSGA, values_BSGA, mask)
    rules = placement.rules
    queries_spec = PartitionSpec(*rules.spec(("batch", "length", "heads", "head_dim")))
    keys_spec = PartitionSpec(*rules.spec(("batch", "length", "kv_heads", "head_dim")))
    run = jax.shard_map(
        attention,
        mesh=placement.mesh,
        in_specs=(queries_spec, keys_spec, keys_spec, PartitionSpec(*rules.spec(("batch", "length")))),
        out_specs=queries_spec,
        check_vma=False,
    )
    return run(queries_BTHA, keys_BSGA, values_BSGA, mask)

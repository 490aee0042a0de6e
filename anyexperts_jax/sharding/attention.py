"""Sharded attention: kernels run per device on its own sequences and heads; XLA partitions everything else."""

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
    """Returns `mask` unchanged if a kernel will run, else as a dense array, computed once for all layers.

    Args:
      width: the head width.
      dtype: the dtype of queries, keys and values.
    """
    runs = default_implementation(mask.valid_BT.shape[1], width, dtype, causal=True) in KERNELS
    if placement is None:
        whole = sees_one_device()
    else:  # a kernel on one device needs all positions of a sequence
        whole = parts(placement.mesh, placement.rules.length) == 1
    return mask if runs and whole else mask.dense()


def split_attention(
    queries_BTHA: Float[Array, "B T H A"],
    keys_BSGA: Float[Array, "B S G A"],
    values_BSGW: Float[Array, "B S G W"],
    mask: Bool[Array, "B T S"] | CausalMask,
    placement: Placement | None,
) -> Float[Array, "B T H W"]:
    """`ops.attention` on a mesh. A `CausalMask` means a kernel, which XLA cannot partition, so it runs in a
    `shard_map`."""
    if placement is None or placement.mesh.size == 1 or not isinstance(mask, CausalMask):
        return attention(queries_BTHA, keys_BSGA, values_BSGW, mask)
    rules = placement.rules
    queries_spec = PartitionSpec(*rules.spec(("batch", "length", "heads", "head_dim")))
    keys_spec = PartitionSpec(*rules.spec(("batch", "length", "kv_heads", "head_dim")))
    run = jax.shard_map(
        attention,
        mesh=placement.mesh,
        in_specs=(queries_spec, keys_spec, keys_spec, PartitionSpec(*rules.spec(("batch", "length")))),
        out_specs=queries_spec,
        check_vma=False,  # Pallas calls do not declare over which mesh axes their results vary
    )
    return run(queries_BTHA, keys_BSGA, values_BSGW, mask)

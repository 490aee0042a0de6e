"""Selection: the top K_i columns of the ranking. Virtual slots beyond the cap go to the next real experts."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.remat import ROUTING
from anyexperts_jax.routing.groups import limit_to_groups
from anyexperts_jax.routing.slots import virtual_cap


@dataclasses.dataclass(frozen=True)
class Selection:
    """Candidates in order of rank, and how many of them get a slot. J is the largest virtual cap."""

    real_ids_NK: Int[Array, "N K"]  # in [0, E); meaningful for the first real_slots_N
    virtual_ids_NJ: Int[Array, "N J"]  # in [0, V); meaningful for the first virtual_slots_N
    real_slots_N: Int[Array, "N"]
    virtual_slots_N: Int[Array, "N"]
    last_is_virtual_N: Bool[Array, "N"]  # the selected slot of the lowest rank is virtual

    @property
    def real_live_NK(self) -> Bool[Array, "N K"]:
        return jnp.arange(self.real_ids_NK.shape[1], dtype=jnp.int32)[None] < self.real_slots_N[:, None]

    @property
    def virtual_live_NJ(self) -> Bool[Array, "N J"]:
        return jnp.arange(self.virtual_ids_NJ.shape[1], dtype=jnp.int32)[None] < self.virtual_slots_N[:, None]

    def columns_NC(self, num_experts: int, num_virtual: int) -> Bool[Array, "N C"]:
        """Which router columns have a slot.

        Decided by ids, not by comparing ranks with the last selected rank: XLA may recompute a rank in another fusion,
        with a result that is one ulp off. One `any` over K stays vectorised; a sum over N and K at once takes 90 times
        as long on a CPU at N 4096, K 12, E 256.
        """
        real_NK = jnp.where(self.real_live_NK, self.real_ids_NK, -1)
        virtual_NJ = jnp.where(self.virtual_live_NJ, self.virtual_ids_NJ, -1)
        real_NE = (real_NK[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32)[None, None]).any(axis=1)
        virtual_NV = (virtual_NJ[:, :, None] == jnp.arange(num_virtual, dtype=jnp.int32)[None, None]).any(axis=1)
        return jnp.concatenate([real_NE, virtual_NV], axis=1)


def select(
    config: AnyExpertsConfig,
    real_NE: Float[Array, "N E"],
    virtual_NV: Float[Array, "N V"],
    slots_N: Int[Array, "N"],
) -> Selection:
    """Selects the best K_i = slots_N columns of the ranking; a token with 0 slots (padding) selects none.

    Ties go to the lower column, and to real columns before virtual ones. At most `virtual_cap` virtual columns are
    selected; the real experts next in rank get the surplus slots (AnyExperts section 2, steps 5 and 6; the rule for
    ties and this refill are readings).
    """
    # top_k sorts -0.0 after 0.0, but here they tie and the lower column must win.
    real_NE, virtual_NV = (jnp.where(rank_NX == 0, 0, rank_NX) for rank_NX in (real_NE, virtual_NV))
    real_NE = limit_to_groups(real_NE, config.num_groups, config.groups_kept)
    real_NK, real_ids_NK = _top(real_NE, config.slots_bound)
    virtual_NJ, virtual_ids_NJ = _top(virtual_NV, config.virtual_caps[-1])
    # Two top_k calls over E and V columns, and no sort of all C: the j-th virtual column is in the top K_i iff fewer
    # than K_i columns precede it, namely j virtual ones and every real column with at least its rank. It is enough to
    # count among the K best real columns, because K_i <= K.
    before_NJ = (real_NK[:, :, None] >= virtual_NJ[:, None, :]).sum(axis=1, dtype=jnp.int32)
    ranked_NJ = before_NJ + jnp.arange(virtual_NJ.shape[1], dtype=jnp.int32)[None] < slots_N[:, None]
    virtual_slots_N = jnp.minimum(ranked_NJ.sum(axis=1, dtype=jnp.int32), virtual_cap(config, slots_N))
    real_slots_N = slots_N - virtual_slots_N
    real_last_N, virtual_last_N = _last(real_NK, real_slots_N), _last(virtual_NJ, virtual_slots_N)
    last_is_virtual_N = (virtual_slots_N > 0) & ((real_slots_N == 0) | (virtual_last_N <= real_last_N))
    # Every remat policy saves these. A recomputed top-k could break near-ties the other way, and the backward pass
    # would then update experts that did not compute the forward pass.
    save = lambda array: checkpoint_name(array, ROUTING)  # noqa: E731
    return Selection(
        real_ids_NK=save(real_ids_NK),
        virtual_ids_NJ=save(virtual_ids_NJ),
        real_slots_N=save(real_slots_N),
        virtual_slots_N=save(virtual_slots_N),
        last_is_virtual_N=save(last_is_virtual_N),
    )


def _top(rank_NX: Float[Array, "N X"], width: int) -> tuple[Float[Array, "N W"], Int[Array, "N W"]]:
    """The best `width` columns in order of rank, ties by the lower column; padded with -inf and id 0 if X < width."""
    N, X = rank_NX.shape
    count = min(width, X)
    if count == 0:
        return jnp.full((N, width), -jnp.inf, rank_NX.dtype), jnp.zeros((N, width), jnp.int32)
    rank_NW, ids_NW = jax.lax.top_k(rank_NX, count)
    missing = ((0, 0), (0, width - count))
    return jnp.pad(rank_NW, missing, constant_values=-jnp.inf), jnp.pad(ids_NW.astype(jnp.int32), missing)


def _last(sorted_NW: Float[Array, "N W"], count_N: Int[Array, "N"]) -> Float[Array, "N"]:
    """The value of the last of the first `count_N` candidates. A masked sum, because it vectorises better than a gather
    of one element per row."""
    return jnp.where(jnp.arange(sorted_NW.shape[1], dtype=jnp.int32)[None] == count_N[:, None] - 1, sorted_NW, 0).sum(
        axis=1
    )

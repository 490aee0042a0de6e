"""Group-limited routing: a token selects real experts from its best groups only (Ling-mini-2.0, DeepSeek-V3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def limit_to_groups(rank_NE: Float[Array, "N E"], num_groups: int, groups_kept: int) -> Float[Array, "N E"]:
    """Sets every expert outside the `groups_kept` best groups to -inf.

    A group is ranked by the sum of its two best experts (of one in groups of one); ties go to the lower group.
    """
    if groups_kept == num_groups:
        return rank_NE
    N, E = rank_NE.shape
    members_NGS = rank_NE.reshape(N, num_groups, E // num_groups)
    group_NG = members_NGS.max(axis=-1)
    if members_NGS.shape[-1] > 1:
        # The second best is the maximum without the best, which needs no sort.
        best_NG = members_NGS.argmax(axis=-1)
        rest_NGS = jnp.where(
            jnp.arange(E // num_groups, dtype=jnp.int32)[None, None] == best_NG[..., None], -jnp.inf, members_NGS
        )
        group_NG = group_NG + rest_NGS.max(axis=-1)
    # By index, not by comparing with the last kept rank: exactly `groups_kept` groups stay even if ranks tie.
    kept_NI = jax.lax.top_k(group_NG, groups_kept)[1]
    kept_NG = (kept_NI[:, :, None] == jnp.arange(num_groups, dtype=jnp.int32)[None, None]).any(axis=1)
    return jnp.where(kept_NG[..., None], members_NGS, -jnp.inf).reshape(N, E)
